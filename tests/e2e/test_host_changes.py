"""What the relay knows of its host by name changes while it runs: it looks again, and nothing is direct meanwhile that
should not be."""

import contextlib
import signal
import socket
import time
from pathlib import Path

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, for_all_accounts
from admin_views import status
from deadlines import wait_until
from host_change_trials import (
    RELAYED,
    Knocker,
    PeerServer,
    long_session,
    one_connection,
    plug,
    rename,
    switch_ipv6,
    unplug,
)
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, opened, ping
from service_manager import ServiceManager

from tproxy_relay.guard.guard import CHECK_INTERVAL
from tproxy_relay.intercept import programs
from tproxy_relay.lab import Lab, LabError, RelayProcess

IPV6_AGAIN = 5.0
"""The same for IPv6 that is switched on."""
AGAIN = 2.0
"""Seconds after the interface is back until a client is relayed."""
ROUNDS = 5
CHECKED = 2 * CHECK_INTERVAL
"""Seconds in which the guard looks at a change at least once."""
WORKERS = {"root": (), **({"account": ("--user", ACCOUNT)} if HAVE_ACCOUNTS else {})}
"""The second ones have no capability."""
INBOUND = ("--intercept-inbound", str(PORT), "--interface", "rc")


def knockers(lab: Lab) -> list[Knocker]:
    return [Knocker(lab.client, lab.server, family) for family in FAMILIES.values()]


def prove_interception(lab: Lab, relay: RelayProcess) -> None:
    for family in FAMILIES.values():
        with lab.client.connect(lab.server.address(family), PORT) as sock:
            name = sock.getsockname()[:2]
            assert ping_after_greeting(sock) == ""
        relay.wait_for_record(lambda line: str(line["client"]).endswith(f":{name[1]}"))


def ping_after_greeting(sock: socket.socket) -> str:
    got = b""
    while len(got) < 64:
        data = sock.recv(64 - len(got))
        if not data:
            return "EOF"
        got += data
    return ping(sock)


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.parametrize("kind", [*BACKENDS, "nft redirect", "nft address"])
def test_an_interface_goes_and_comes_back(fresh_lab: Lab, kind: str, on_failure: str) -> None:
    lab, (backend, *more) = fresh_lab, kind.split()
    way = {"redirect": ("--mode", "redirect"), "address": ("--preserve-source", "address")}
    options = (*INBOUND, "--backend", backend, "--on-failure", on_failure, *(way[more[0]] if more else ()))
    with PeerServer(lab.server), lab.relay_process(*options) as relay:
        prove_interception(lab, relay)
        with contextlib.ExitStack() as stack:
            watching = [stack.enter_context(one) for one in knockers(lab)]
            for _ in range(ROUNDS):
                unplug(lab)
                plug(lab)
                back = time.monotonic()
                assert max(one.first_relayed(back) for one in watching) < AGAIN
        served = set.union(*(one.answers() for one in watching))
        assert "direct" not in served and RELAYED in served
        prove_interception(lab, relay)
        relay.stop()


def words(relay: RelayProcess, wanted: str) -> int:
    """How many lines of the log have these words."""
    return sum(wanted in str(line.get("message")) for line in relay.lines())


@pytest.mark.parametrize("workers", WORKERS)
def test_a_session_outlives_an_interface_that_is_made_again(fresh_lab: Lab, workers: str) -> None:
    lab, options = fresh_lab, WORKERS[workers]
    wrapper = for_all_accounts() if options else ()
    with PeerServer(lab.server), lab.relay_process(*INBOUND, *options, wrapper=wrapper) as relay:
        sessions = [long_session(lab, family) for family in FAMILIES.values()]
        for _ in range(2):
            unplug(lab)
            plug(lab)
            assert [ping(one) for one in sessions] == ["", ""]
        for one in sessions:
            one.shutdown(socket.SHUT_WR)
            assert relay.record_of(one)["outcome"] == "completed"
            one.close()
        relay.stop()


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interface_that_comes_after_the_relay(fresh_lab: Lab, backend: str, on_failure: str) -> None:
    lab = fresh_lab
    unplug(lab)
    options = (*INBOUND, "--backend", backend, "--on-failure", on_failure)
    with PeerServer(lab.server), lab.relay_process(*options) as relay:
        relay.wait_for_line(lambda line: "rc is not there yet: nothing is intercepted until" in line["message"])
        assert status(lab, code=1)["complaints"] == ["interface rc is not there: no client can come in until it is"]
        plug(lab)
        with contextlib.ExitStack() as stack:
            back = time.monotonic()
            watching = [stack.enter_context(one) for one in knockers(lab)]
            assert max(one.first_relayed(back) for one in watching) < AGAIN
        assert "direct" not in set.union(*(one.answers() for one in watching))
        relay.wait_for_line(lambda line: "rc is there: its clients are served" in line["message"])
        assert status(lab)["complaints"] == []
        prove_interception(lab, relay)
        assert words(relay, "is not there yet") == words(relay, "is there") == 1
        relay.stop()


def test_an_interface_is_renamed(fresh_lab: Lab) -> None:
    """Away from the name it is gone, and what it brings is not inbound; with the name, it has come."""
    lab = fresh_lab
    with PeerServer(lab.server), lab.relay_process(*INBOUND) as relay:
        prove_interception(lab, relay)
        rename(lab, "rc", "elsewhere")
        relay.wait_for_line(lambda line: "interface rc is gone" in line["message"])
        for family in FAMILIES.values():
            with Knocker(lab.client, lab.server, family) as watching:  # the first may meet an interface that is down
                wait_until(lambda: "direct" in watching.answers(), "a client is served")
                assert RELAYED not in watching.answers()
        rename(lab, "elsewhere", "rc")
        relay.wait_for_line(lambda line: "interface rc is there" in line["message"])
        prove_interception(lab, relay)
        relay.stop()


@pytest.mark.parametrize("interception", [True, False])
def test_strangers_do_not_reach_a_listener_that_has_an_interface(fresh_lab: Lab, interception: bool) -> None:
    """From elsewhere there is no listener, before and after the interface was made again."""
    lab = fresh_lab
    options = INBOUND if interception else ("--interface", "rc", "--target", f"{lab.server.ipv4}:{PORT}")
    with PeerServer(lab.server), lab.relay_process(*options) as relay:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                lab.server.connect(lab.relay_address(), 15006, timeout=1.0)
            with lab.client.connect(lab.relay.ipv4, 15006) as sock:
                name = f":{sock.getsockname()[1]}"
                assert interception or ping_after_greeting(sock) == ""
            wanted = "not-intercepted" if interception else "completed"
            assert relay.wait_for_record(lambda line, name=name: line["client"].endswith(name))["outcome"] == wanted
            unplug(lab)
            plug(lab)
            wait_until(lambda: words(relay, "is there"), "the relay has seen it")
        relay.stop()


def test_a_reload_and_another_relay_find_the_interface_as_it_is_then(fresh_lab: Lab) -> None:
    lab = fresh_lab
    with PeerServer(lab.server), lab.relay_process(*INBOUND) as relay:
        unplug(lab)
        relay.wait_for_line(lambda line: "interface rc is gone" in line["message"])
        relay.signal(signal.SIGHUP)
        relay.wait_for_line(lambda line: line["message"] == "reloaded")
        plug(lab)
        wait_until(lambda: one_connection(lab.client, lab.server, socket.AF_INET) == RELAYED, "relayed again")
        wait_until(lambda: len(relay.records()) == opened(relay), "it has no connection left that it would wait for")
        unplug(lab)
        with lab.relay_process(*INBOUND, "--take-over") as after:
            assert relay.wait() == 0
            plug(lab)
            for family in FAMILIES.values():
                wait_until(
                    lambda family=family: one_connection(lab.client, lab.server, family) == RELAYED, "by the other one"
                )
            prove_interception(lab, after)
            after.stop()


def test_a_relay_that_is_started_again_finds_the_interface_with_the_sockets_that_were_stored(
    fresh_lab: Lab, tmp_path: Path
) -> None:
    lab = fresh_lab
    with PeerServer(lab.server), ServiceManager(tmp_path) as manager:
        for _ in range(2):
            with lab.relay_process(*INBOUND, wrapper=manager.wrapper) as relay:
                prove_interception(lab, relay)
                wait_until(lambda: len(manager.names) == 4, "they are stored")
                relay.stop()
            unplug(lab)
            plug(lab)


# --- IPv6 comes and goes

SUBSET_PID = ("unshare", "-m", "sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$@"', "sh")
"""A process sees no /proc/net and no /proc/sys, as with ProcSubset=pid of a unit."""


def over_ipv6(lab: Lab) -> dict[str, Knocker]:
    """One that is inbound, and one that is outbound."""
    family = socket.AF_INET6
    return {"inbound": Knocker(lab.client, lab.server, family), "outbound": Knocker(lab.relay, lab.server, family)}


def relayed_when_it_comes(lab: Lab, options: tuple[str, ...], wrapper: tuple[str, ...] = ()) -> RelayProcess:
    """Start without IPv6 and switch it on under the eyes of clients."""
    switch_ipv6(lab, False)
    with PeerServer(lab.server), lab.relay_process(*BOTH_WAYS, *options, wrapper=wrapper) as relay:
        with contextlib.ExitStack() as stack:
            watching = {name: stack.enter_context(one) for name, one in over_ipv6(lab).items()}
            wait_until(lambda: all(one.seen for one in watching.values()), "clients try")
            switch_ipv6(lab, True)
            came = time.monotonic()
            took = {name: one.first_relayed(came) for name, one in watching.items()}
        assert max(took.values()) < IPV6_AGAIN, took
        seen = {name: one.answers() for name, one in watching.items()}
        assert "direct" not in seen["inbound"]
        assert "direct" not in seen["outbound"] or "closed" not in options
        for client in (lab.client, lab.relay):
            with client.connect(lab.server.ipv6, PORT) as sock:
                assert ping_after_greeting(sock) == ""
                sock.shutdown(socket.SHUT_WR)
                assert relay.record_of(sock)["outcome"] == "completed"
        refused = ["ip", "-6", "rule"]
        wait_until(lambda: "unreachable" not in lab.relay.run(refused).stdout, "no longer refused")
        assert status(lab)["complaints"] == []
        assert [line for line in relay.lines() if line["levelname"] == "ERROR"] == []
        relay.stop()
    return relay


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ipv6_comes_after_the_relay(fresh_lab: Lab, backend: str, on_failure: str) -> None:
    relayed_when_it_comes(fresh_lab, ("--backend", backend, "--on-failure", on_failure))


def test_ipv6_comes_to_a_relay_that_listens_on_loopback_addresses_only(fresh_lab: Lab) -> None:
    """As the shipped configuration has it."""
    relayed_when_it_comes(fresh_lab, ("--bind", "127.0.0.1,::1", "--on-failure", "closed"))


def test_ipv6_comes_to_a_relay_that_sees_its_own_processes_only(fresh_lab: Lab) -> None:
    relayed_when_it_comes(fresh_lab, ("--on-failure", "closed"), SUBSET_PID)


def test_a_host_without_ipv6_needs_no_ip6tables(fresh_lab: Lab, tmp_path: Path) -> None:
    """As with a kernel that lacks its modules. What is there when IPv6 has come is found by a reload."""
    lab = fresh_lab
    switch_ipv6(lab, False)
    programs_that_fail = [tmp_path / f"ip6tables-legacy-{job}" for job in ("save", "restore")]
    for path in programs_that_fail:
        path.write_text("#!/bin/sh\ncase $0$* in *save*-t*|*restore*) echo 'no such table' >&2; exit 3; esac\n")
        path.chmod(0o755)
    wrapper = ("env", f"PATH={tmp_path}:{programs.search_path()}")
    options = (*BOTH_WAYS, "--backend", "iptables-legacy")
    with PeerServer(lab.server), lab.relay_process(*options, wrapper=wrapper) as relay:
        relay.wait_for_line(lambda line: "IPv4 only, until a reload" in line["message"])
        assert one_connection(lab.client, lab.server, socket.AF_INET) == RELAYED
        switch_ipv6(lab, True)
        for path in programs_that_fail:
            path.unlink()
        relay.signal(signal.SIGHUP)
        relay.wait_for_line(lambda line: line["message"] == "reloaded")
        prove_interception(lab, relay)
        relay.stop()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ipv6_that_is_switched_off_is_no_trouble(fresh_lab: Lab, backend: str) -> None:
    """Nothing is there to be relayed; when it is back, it is."""
    lab = fresh_lab
    with PeerServer(lab.server), lab.relay_process(*BOTH_WAYS, "--backend", backend) as relay:
        assert one_connection(lab.client, lab.server, socket.AF_INET6) == RELAYED
        for _ in range(2):
            switch_ipv6(lab, False)
            with contextlib.suppress(LabError):
                relay.wait_for_line(lambda line: line["levelname"] == "ERROR", CHECKED)
            assert one_connection(lab.client, lab.server, socket.AF_INET) == RELAYED
            switch_ipv6(lab, True)
            came = time.monotonic()
            with Knocker(lab.client, lab.server, socket.AF_INET6) as watching:
                assert watching.first_relayed(came) < IPV6_AGAIN
        assert [line for line in relay.lines() if line["levelname"] == "ERROR"] == []
        assert status(lab)["complaints"] == []
        relay.stop()
