"""What the relay knows of its host by name changes while it runs: it looks again, and nothing is direct meanwhile that
should not be."""

import contextlib
import signal
import socket
import time

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, for_all_accounts
from admin_views import status
from deadlines import wait_until
from host_change_trials import RELAYED, Knocker, PeerServer, long_session, one_connection, plug, rename, unplug
from interception import BACKENDS, FAMILIES, PORT, ping

from tproxy_relay.lab import Lab, RelayProcess

AGAIN = 2.0
"""Seconds after the interface is back until a client is relayed."""
ROUNDS = 5
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
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interface_goes_and_comes_back(fresh_lab: Lab, backend: str, on_failure: str) -> None:
    lab = fresh_lab
    options = (*INBOUND, "--backend", backend, "--on-failure", on_failure)
    with PeerServer(lab.server), lab.relay_process(*options) as relay:
        prove_interception(lab, relay)
        with contextlib.ExitStack() as stack:
            watching = [stack.enter_context(one) for one in knockers(lab)]
            for _ in range(ROUNDS):
                unplug(lab)
                plug(lab)
                back = time.monotonic()
                assert max(one.first_served(back) for one in watching) < AGAIN
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
            assert max(one.first_served(back) for one in watching) < AGAIN
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
        assert {one_connection(lab.client, lab.server, family) for family in FAMILIES.values()} == {"direct"}
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
