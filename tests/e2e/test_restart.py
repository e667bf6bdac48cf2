"""The relay is restarted again and again under clients that keep coming, 200 a second: none is refused or reset, none
waits for ever, and every byte is right. Where one relay hands over to the next, transfers that began long before go on
too.

The manager of sockets, and the one with a store for them, are played by service_manager.py.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from deadlines import wait_until
from flows import Flow, echo_server, steady, streams
from interception import PORT, look, ping, processes
from service_manager import ServiceManager

from tproxy_relay.lab import Lab, LabError, Line, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

pytestmark = pytest.mark.slow

RESTARTS = 10
OTHER = PORT + 1
INBOUND = ("--intercept-inbound", f"{PORT}-{OTHER}")
TAKE_OVER = "--take-over"


@pytest.fixture
def served(fresh_lab: Lab) -> Iterator[Lab]:
    """A lab with an echo server; afterwards the relay's host is as it was, and no process is left there."""
    before = look(fresh_lab)
    with echo_server(fresh_lab.server, PORT, OTHER):
        yield fresh_lab
    wait_until(lambda: not processes(fresh_lab, "-m tproxy_relay"), "no process is left")
    assert look(fresh_lab) == before


def is_relayed(lab: Lab, relay: RelayProcess, port: int = PORT) -> Line:
    """A new connection works; what the relay says of it."""
    with lab.client.connect(lab.server.ipv4, port) as sock:
        assert ping(sock) == ""
        return opened(relay, sock)


def opened(relay: RelayProcess, client: socket.socket) -> Line:
    """What the relay says of this client."""
    mine = str(from_sockaddr(client.getsockname()))
    return relay.wait_for_line(lambda line: line["message"] == "connection open" and line["client"] == mine)


def goes_direct(lab: Lab, *relays: RelayProcess) -> bool:
    """A new connection works, and none of these relays has it."""
    with lab.client.connect(lab.server.ipv4, PORT) as sock:
        assert ping(sock) == ""
        mine = str(from_sockaddr(sock.getsockname()))
    return not any(line.get("client") == mine for relay in relays for line in relay.lines())


@contextlib.contextmanager
def clients(lab: Lab) -> Iterator[tuple[Flow, Flow]]:
    """A transfer that stays, and those that come and go."""
    with streams(lab.client, lab.server.ipv6, PORT, size=30_000) as stays, steady(
        lab.client, lab.server.ipv4, PORT
    ) as come:
        stays.go_on("at first")
        come.go_on("at first")
        yield stays, come


def check(come: Flow) -> int:
    """Nobody of those who came was turned away or got wrong bytes; how many they were."""
    last = come.finish()
    assert last["errors"] == {} and last["begun"] == last["served"], last
    return int(last["served"])


def outcomes(relays: Sequence[RelayProcess]) -> Counter[str]:
    """Of all connections that these relays have had."""
    return Counter(record["outcome"] for relay in relays for record in relay.records())


# --- from one relay to the next

HAND_OVERS = {
    "nft": ("--backend", "nft"),
    "iptables-nft-address": ("--backend", "iptables-nft", "--preserve-source", "address"),
    "nft-redirect": ("--backend", "nft", "--mode", "redirect"),
    "four-workers": ("--workers", "4"),
}


@pytest.mark.parametrize("options", HAND_OVERS.values(), ids=HAND_OVERS)
def test_ten_hand_overs(served: Lab, options: tuple[str, ...]) -> None:
    lab, relays = served, []
    with contextlib.ExitStack() as stack:
        relays.append(stack.enter_context(lab.relay_process(*INBOUND, *options)))
        with clients(lab) as (stays, come):
            for number in range(RESTARTS):
                relays.append(stack.enter_context(lab.relay_process(*INBOUND, *options, TAKE_OVER)))
                relays[-2].wait_for_line(lambda line: line["message"] == "handed over")
                stays.go_on(f"after {number + 1} hand-overs")
                come.go_on(f"after {number + 1} hand-overs")
                if number:
                    ends(relays[-2])
            served_by_now = check(come)
            assert relays[0].returncode is None, "it left its transfer"
            last = stays.finish()
            assert (last["whole"], last["errors"]) == (1, {})
            ends(relays[0])
        relays[-1].stop()
    assert outcomes(relays) == {"completed": served_by_now + 1}, "some were not relayed"
    assert all(relay.records() for relay in relays)
    if "address" in options:
        assert {record["source"] for relay in relays for record in relay.records()} == {"address"}


def test_to_take_over_where_none_runs_is_to_start(served: Lab) -> None:
    with served.relay_process(*INBOUND, TAKE_OVER) as relay:
        is_relayed(served, relay)
        relay.stop()


def test_the_listeners_may_be_others_afterwards(served: Lab) -> None:
    lab = served
    more = ("--ports", "15002,15003", "--inbound-port", "15003")
    with lab.relay_process(*INBOUND) as first, lab.client.connect(lab.server.ipv4, PORT) as stays:
        assert ping(stays) == ""
        assert opened(first, stays)["listener"] == "0.0.0.0:15006"
        with lab.relay_process(*INBOUND, *more, TAKE_OVER) as second:
            assert is_relayed(lab, second)["listener"] == "0.0.0.0:15003"
            assert ping(stays) == ""
            # Its worker hears for a moment those who are on their way to it.
            wait_until(lambda: not listens(lab, 15006), "the port that nobody wants is closed")
            stays.close()
            ends(first)
            second.stop()


def ends(relay: RelayProcess) -> None:
    """All that it has to do is done, and it says so."""
    wait_until(lambda: relay.returncode is not None, "it has ended")
    assert relay.returncode == 0
    relay.wait_for_line(lambda line: line["message"] == "stopped")


def listens(lab: Lab, port: int) -> bool:
    return bool(lab.relay.run(["ss", "-Hltn", f"sport = :{port}"]).stdout)


def refused(lab: Lab, *options: str, wrapper: tuple[str, ...] = ()) -> str:
    """What a relay says that wants to take over, and may not."""
    with pytest.raises(LabError) as raised, lab.relay_process(*INBOUND, *options, TAKE_OVER, wrapper=wrapper):
        pass
    return str(raised.value)


DIFFERING = {
    "mark-mask": ("--mark-mask", "0x70000000"),
    "mode": ("--mode", "redirect"),
    "route-table": ("--route-table", "7007"),
}


@pytest.mark.parametrize("name", DIFFERING)
def test_one_with_other_marks_cannot_take_over(served: Lab, name: str) -> None:
    with served.relay_process(*INBOUND) as relay:
        said = refused(served, *DIFFERING[name])
        assert "exited with 71" in said
        assert f"cannot take over from process {relay.pid}: its {name} differs; stop it, and start again" in said
        is_relayed(served, relay)
        relay.stop()


def test_one_that_would_not_intercept_cannot_take_over_from_one_that_does(served: Lab) -> None:
    with served.relay_process(*INBOUND) as relay:
        with pytest.raises(LabError, match=f"process {relay.pid} intercepts, and this relay would not"):
            with served.relay_process(TAKE_OVER):
                pass
        is_relayed(served, relay)
        relay.stop()


AS_ANOTHER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
os.setresuid(65534, 65534, 65534)
sock.connect("\\0tproxy_relay/relay/" + sys.argv[1])
try:
    sock.send(b'{"want":"listeners","protocol":1}')
except BrokenPipeError:
    pass  # the answer has come already
data, descriptors, _, _ = socket.recv_fds(sock, 65536, 100)
print(data.decode(), len(descriptors))
"""


def test_another_account_cannot_take_over(served: Lab) -> None:
    if served.user_namespace:
        pytest.skip("there is only one account in a user namespace")
    with served.relay_process(*INBOUND) as relay:
        said = served.relay.run([sys.executable, "-c", AS_ANOTHER, str(relay.pid)]).stdout
        assert said.startswith('{"refused":"only root and the account of this relay may ask",')
        assert said.endswith("} 0\n"), "no descriptor"
        is_relayed(served, relay)
        with served.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(served, second)
            ends(relay)
            second.stop()


@contextlib.contextmanager
def stopped_short(lab: Lab, tmp_path: Path, *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A relay that wants to take over, and whose worker never gets ready."""
    command = [sys.executable, "-m", "tproxy_relay", "run", "--config", "/dev/null", "--log-format", "json"]
    with open(tmp_path / "log", "wb") as log:
        child = lab.relay.start([*command, *INBOUND, "--workers", "1", TAKE_OVER, *options], stderr=log)
    workers: list[int] = []
    try:

        def has_stopped() -> bool:
            workers[:] = stop_workers(lab, child.pid)
            return bool(workers)

        wait_until(has_stopped, "it has started a worker")
        yield child
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        child.kill()
        child.wait()


def stop_workers(lab: Lab, parent: int) -> list[int]:
    """Stop those of this supervisor that are about to start."""
    found = []
    for pid in processes(lab, "tproxy_relay.worker"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{parent}\n" in Path(f"/proc/{pid}/status").read_text():
                os.kill(pid, signal.SIGSTOP)
                found.append(pid)
    return found


def test_one_that_is_killed_before_it_is_ready_changes_nothing(served: Lab, tmp_path: Path) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as relay, clients(lab) as (stays, come):
        rules = look(lab)
        with stopped_short(lab, tmp_path) as child:
            come.go_on("while another one prepares")
            said = refused(lab)
            assert "another relay takes over already" in said
            child.kill()
            child.wait()
        assert look(lab) == rules
        come.go_on("when it was killed")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            check(come)
            assert stays.finish()["errors"] == {}
            ends(relay)
            second.stop()


def test_one_whose_ruleset_cannot_be_installed_changes_nothing(served: Lab) -> None:
    """The one before does not intercept, so there is a ruleset to install."""
    lab, address = served, (served.relay.ipv4, 15006)
    route = ("192.0.2.0/24", "dev", "rs", "table", "7006")  # in the table that must be empty
    lab.relay.run(["ip", "route", "add", *route])
    try:
        with lab.relay_process("--target", f"{lab.server.ipv4}:{PORT}") as relay:
            assert "7006" in refused(lab)
            with lab.client.connect(*address) as sock:
                assert ping(sock) == ""
                opened(relay, sock)
            assert relay.returncode is None
            relay.stop()
    finally:
        lab.relay.run(["ip", "route", "del", *route])


def test_one_that_gives_up_waiting_changes_nothing(served: Lab, tmp_path: Path) -> None:
    """The one before answers so late that nobody is there any more to take it over."""
    lab = served
    with lab.relay_process(*INBOUND) as relay, streams(lab.client, lab.server.ipv4, PORT) as stays:
        stays.go_on("at first")
        rules = look(lab)
        with stopped_short(lab, tmp_path) as child:
            os.kill(relay.pid, signal.SIGSTOP)
            try:
                for pid in processes(lab, "tproxy_relay.worker"):
                    os.kill(pid, signal.SIGCONT)
                assert child.wait(20) == 71
            finally:
                os.kill(relay.pid, signal.SIGCONT)
        assert "gives no sensible answer" in (tmp_path / "log").read_text()
        is_relayed(lab, relay)
        stays.go_on("when the other one has given up")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            assert not any(line["message"] == "handed over" and line["pid"] == child.pid for line in relay.lines())
            assert look(lab) == rules
            assert stays.finish()["whole"] == 1
            ends(relay)
            second.stop()


def test_a_reload_waits_for_one_that_takes_over(served: Lab, tmp_path: Path) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as relay:
        with stopped_short(lab, tmp_path):
            relay.signal(signal.SIGHUP)
            is_relayed(lab, relay)
            assert len(relay.workers) == 1
        relay.wait_for_line(lambda line: line["message"] == "reloaded")
        is_relayed(lab, relay)
        relay.stop()


def test_one_that_reloads_cannot_be_taken_over(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as relay:
        old = relay.worker
        relay.signal(signal.SIGHUP)
        rising: list[int] = []
        wait_until(lambda: rising or rising.extend(set(relay.workers) - {old}), "it reloads")
        os.kill(rising[0], signal.SIGSTOP)
        said = refused(lab)
        assert f"cannot take over from process {relay.pid}: it is reloading" in said
        os.kill(rising[0], signal.SIGCONT)
        relay.wait_for_line(lambda line: line["message"] == "reloaded")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            ends(relay)
            second.stop()


def test_when_the_next_one_is_killed_connections_go_direct_and_the_old_ones_go_on(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as first, streams(lab.client, lab.server.ipv4, PORT) as stays:
        stays.go_on("at first")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            second.kill()
            drains(first)
            assert goes_direct(lab, first, second)
            stays.go_on("when the next one was killed")
            assert stays.finish()["whole"] == 1
            ends(first)


def drains(relay: RelayProcess) -> None:
    """It is told that the next one has gone."""
    relay.wait_for_line(lambda line: line["message"] == "draining")


def test_of_three_the_last_is_killed_and_the_others_finish_their_transfers(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as first, streams(lab.client, lab.server.ipv4, PORT) as stays:
        stays.go_on("at first")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second, streams(lab.client, lab.server.ipv6, PORT) as other:
            other.go_on("with the second")
            with lab.relay_process(*INBOUND, TAKE_OVER) as third:
                is_relayed(lab, third)
                third.kill()
                drains(first)
                drains(second)
                assert goes_direct(lab, first, second, third)
                stays.go_on("when the third was killed")
                other.go_on("when the third was killed")
                assert other.finish()["whole"] == 1
                ends(second)
                stays.go_on("when the second has ended")
                assert stays.finish()["whole"] == 1
                ends(first)


@contextlib.contextmanager
def lingering(lab: Lab) -> Iterator[tuple[RelayProcess, socket.socket]]:
    """The rules are there only for this connection of this relay, which has handed over."""
    with lab.relay_process(*INBOUND) as first, lab.client.connect(lab.server.ipv4, PORT) as stays:
        assert ping(stays) == ""
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            second.kill()
        drains(first)
        assert ping(stays) == ""
        yield first, stays
        assert ping(stays) == "ConnectionResetError(104, 'Connection reset by peer')", "it hangs"
        ends(first)


@pytest.mark.parametrize("options", [(), (TAKE_OVER,)], ids=["started", "taking over"])
def test_a_new_one_need_not_wait_for_the_last_transfers(served: Lab, options: tuple[str, ...]) -> None:
    lab = served
    with lingering(lab) as (first, _):
        with lab.relay_process(*INBOUND, *options) as third:
            is_relayed(lab, third)
            third.stop()


def test_rules_by_hand_need_not_wait_for_the_last_transfers(served: Lab, rules: Callable[..., str]) -> None:
    lab = served
    with lingering(lab) as (first, stays):
        with pytest.raises(LabError, match="held by process"):
            rules(lab, "status", *INBOUND)  # it is degraded
        assert ping(stays) == "", "to look changes nothing"
        rules(lab, "apply", *INBOUND)
        rules(lab, "remove")


def test_when_the_next_one_stops_the_old_one_still_finishes_its_transfers(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as first, streams(lab.client, lab.server.ipv4, PORT) as stays:
        stays.go_on("at first")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            second.stop()
        assert goes_direct(lab, first, second)
        stays.go_on("when the next one has stopped")
        assert stays.finish()["whole"] == 1
        ends(first)


def test_one_that_has_handed_over_obeys_drain_timeout(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND, "--drain-timeout", "0.5") as first:
        with lab.client.connect(lab.server.ipv4, PORT) as stays, lab.relay_process(*INBOUND, TAKE_OVER) as second:
            assert ping(stays) == ""
            rules = look(lab)
            first.terminate()
            ends(first)
            assert ping(stays) == "ConnectionResetError(104, 'Connection reset by peer')"
            assert first.record_of(stays)["outcome"] == "drained"
            assert look(lab) == rules
            is_relayed(lab, second)
            second.stop()


def test_one_that_has_handed_over_says_so_and_then_ends(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as first, lab.client.connect(lab.server.ipv4, PORT) as stays:
        assert ping(stays) == ""
        wrote_to = os.readlink(f"/proc/{first.pid}/fd/2")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            said = first.wait_for_line(lambda line: line["message"] == "handed over")
            assert (said["pid"], said["live"]) == (second.pid, 1)
            stays.close()
            ends(first)
            last = first.lines()[-1]
            assert (last["message"], last["accepted"], last["closed"]) == ("stopped", 1, {"completed": 1})
            here = processes(lab, "-m tproxy_relay")
            assert wrote_to not in [os.readlink(f"/proc/{pid}/fd/2") for pid in here], "its log does not end"
            is_relayed(lab, second)
            second.stop()


# --- sockets that a service manager keeps


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    with ServiceManager(tmp_path) as running:
        yield running


@pytest.mark.parametrize("managed", [True, False], ids=["its own rules", "rules applied before"])
def test_ten_restarts_with_sockets_of_a_service_manager(
    served: Lab, manager: ServiceManager, rules: Callable[..., str], managed: bool
) -> None:
    lab, relays = served, []
    for address in ("0.0.0.0", "::"):
        for port in (15002, 15006):
            manager.listen(lab.relay, address, port)
    if not managed:
        rules(lab, "apply", *INBOUND)
    try:
        with steady(lab.client, lab.server.ipv4, PORT) as come, contextlib.ExitStack() as stack:
            for number in range(RESTARTS + 1):
                wrapper = manager.wrapper
                options = INBOUND if managed else ()
                relay = stack.enter_context(lab.relay_process(*options, wrapper=wrapper))
                relays.append(relay)
                relay.wait_for_record(lambda record: record["outcome"] == "completed")
                come.go_on(f"with relay {number}")
                if number < RESTARTS:
                    relay.stop()
            served_by_now = check(come)
            relays[-1].stop()
    finally:
        if not managed:
            rules(lab, "remove")
    seen = outcomes(relays)
    assert set(seen) == {"completed"}
    # Between two relays their own rules are gone, and clients go direct; the others wait in the backlog.
    assert seen["completed"] <= served_by_now if managed else seen["completed"] == served_by_now
    assert manager.names == [], "sockets of a unit are not for the store"


def test_restarts_with_the_sockets_that_the_relay_has_stored(served: Lab, manager: ServiceManager) -> None:
    lab = served
    ports = ["15002,15006", "15002,15006", "15003,15006", "15003,15006,15007", "15002,15006"]
    with steady(lab.client, lab.server.ipv4, PORT) as come:
        inodes: dict[str, int] = {}
        for number, listed in enumerate(ports):
            outbound = listed.partition(",")[0]
            options = (*INBOUND, "--ports", listed, "--outbound-port", outbound)
            with lab.relay_process(*options, wrapper=manager.wrapper) as relay:
                wanted = sorted(
                    f"tproxy_relay.listener.{host}_{port}" for host in ("0.0.0.0", "[__]") for port in listed.split(",")
                )
                wait_until(lambda: manager.names == wanted, f"{wanted} are stored")
                relay.wait_for_record(lambda record: record["outcome"] == "completed")
                come.go_on(f"with relay {number}")
                now = {kept.name: kept.inode for kept in manager.stored}
                assert all(now[name] == inodes[name] for name in set(now) & set(inodes)), "opened anew"
                inodes = now
                relay.stop()
                assert set(outcomes([relay])) == {"completed"}
            assert listens(lab, 15006) and not listens(lab, 15009)
        check(come)


def test_clients_wait_for_the_next_relay_where_a_store_has_the_sockets(
    served: Lab, manager: ServiceManager, rules: Callable[..., str]
) -> None:
    lab, relays = served, []
    rules(lab, "apply", *INBOUND)
    with contextlib.ExitStack() as stack:
        stack.callback(rules, lab, "remove")
        relays.append(stack.enter_context(lab.relay_process(wrapper=manager.wrapper)))
        with steady(lab.client, lab.server.ipv4, PORT) as come:
            for number in range(3):
                come.go_on(f"with relay {number}")
                relays[-1].stop()
                relays.append(stack.enter_context(lab.relay_process(wrapper=manager.wrapper)))
            come.go_on("with the last one")
            served_by_now = check(come)
        relays[-1].stop()
    assert outcomes(relays) == {"completed": served_by_now}


def test_stored_sockets_do_not_fix_the_mode(served: Lab, manager: ServiceManager) -> None:
    """Those of another mode are made fit."""
    lab = served
    for mode in ("redirect", "tproxy", "redirect"):
        with lab.relay_process(*INBOUND, "--mode", mode, wrapper=manager.wrapper) as relay:
            is_relayed(lab, relay)
            relay.stop()


def test_when_both_are_told_to_stop_the_old_one_still_finishes_its_transfers(served: Lab) -> None:
    lab = served
    with lab.relay_process(*INBOUND) as first, streams(lab.client, lab.server.ipv4, PORT) as stays:
        stays.go_on("at first")
        with lab.relay_process(*INBOUND, TAKE_OVER) as second:
            is_relayed(lab, second)
            first.terminate()
            drains(first)
            second.stop()
        stays.go_on("when both were told")
        assert stays.finish()["whole"] == 1
        ends(first)
