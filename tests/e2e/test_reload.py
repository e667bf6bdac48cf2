"""The configuration is read again (HUP): what it says now holds for new connections, and the live ones never notice,
however often it happens, and whatever nonsense is in the file.

One relay goes through all kinds of changes, while three transfers that began before the first of them, one in each
topology, go on to the last.
"""

import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from accounts import for_all_accounts
from configured import OTHER, Configured, merged, text_of
from deadlines import wait_until
from flows import Flow, echo_server, steady, streams
from interception import FAMILIES, PORT, attempt, look, ping, processes, ways
from rows import Seen
from service_manager import ServiceManager

import tproxy_relay
from tproxy_relay.lab import Host, Lab, Line
from tproxy_relay.net.endpoint import from_sockaddr

pytestmark = pytest.mark.slow

SILENT = PORT + 5
"""A port of the server that answers nothing, not even with a refusal."""
FIRST_ADDRESS, GUEST = "10.81.1.2", "10.81.1.77"


@dataclass
class Site:
    """The lab, its relay, and the transfers through it."""

    lab: Lab
    configured: Configured
    transfers: dict[str, Flow]
    worker: int
    """That has the transfers, from beginning to end."""

    def go_on(self, when: str) -> None:
        for way, transfer in self.transfers.items():
            transfer.go_on(f"{way}, {when}")


@contextlib.contextmanager
def echoing(lab: Lab) -> Iterator[None]:
    with echo_server(lab.server, PORT, PORT + 2), echo_server(lab.relay, PORT, PORT + 2):
        yield


@pytest.fixture(scope="module")
def module_site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    drop = f"table inet silent {{ chain input {{ type filter hook input priority 0; tcp dport {SILENT} drop; }}; }}"
    lab.server.run(["nft", "-f", "-"], input=drop)
    lab.client.run(["ip", "address", "add", f"{GUEST}/24", "dev", "cr"])
    before = look(lab)
    configured = Configured(lab, tmp_path_factory.mktemp("reload"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(echoing(lab))
        relay = stack.enter_context(configured.relay)
        families = {"gateway": socket.AF_INET, "host": socket.AF_INET6, "local": socket.AF_INET}
        transfers = {
            way: stack.enter_context(streams(source, destination.address(families[way]), PORT))
            for way, (source, destination) in ways(lab).items()
        }
        site = Site(lab, configured, transfers, relay.worker)
        site.go_on("at first")
        assert len([line for line in relay.lines() if line["message"] == "connection open"]) == len(transfers)
        configured.reload()  # so that the transfers are those of a worker that leaves
        yield site
        for way, transfer in transfers.items():
            last = transfer.finish()
            assert (last["whole"], last["errors"]) == (1, {}), (way, last)
        wait_until(lambda: site.worker not in configured.workers, "the first worker ends with its last connection")
        relay.stop()
    wait_until(lambda: not processes(lab, "-m tproxy_relay"), "no process is left")
    assert look(lab) == before


@pytest.fixture
def site(module_site: Site) -> Iterator[Site]:
    """With the file of the start in force, and the transfers going on afterwards."""
    module_site.configured.reload()
    yield module_site
    module_site.go_on("afterwards")


@pytest.fixture
def configured(site: Site) -> Configured:
    return site.configured


def relayed(site: Site, port: int = PORT) -> dict[str, Line]:
    """A new connection of each way and family is relayed; what the relay says of them."""
    return {
        f"{way}/{name}": site.configured.opened(*ends, family, port)
        for way, ends in ways(site.lab).items()
        for name, family in FAMILIES.items()
    }


def direct(site: Site, port: int) -> list[str]:
    """A new connection of each way and family works; the clients."""
    return [
        site.configured.visit(*ends, family, port) for ends in ways(site.lab).values() for family in FAMILIES.values()
    ]


# --- each kind of change


def test_ports_to_intercept_come_and_go(site: Site) -> None:
    both, none = f"{PORT}-{OTHER}", OTHER + 1
    for inbound, outbound in ((both, both), (OTHER, OTHER), (OTHER, none), (both, PORT), (PORT, PORT)):
        said = site.configured.reload(intercept_inbound=inbound, intercept_outbound=outbound)
        assert said["workers"] == 1
        went_direct = []
        for way, (source, destination) in ways(site.lab).items():
            listed = str(outbound if way == "local" else inbound)
            for port in (PORT, OTHER):
                if str(port) not in (listed if listed != both else f"{PORT},{OTHER}"):
                    went_direct.append(site.configured.visit(source, destination, port=port))
                else:
                    assert site.configured.opened(source, destination, port=port)["orig_dst"].endswith(f":{port}")
        site.configured.opened(site.lab.client, site.lab.server, port=OTHER if inbound == OTHER else PORT)
        assert all(map(site.configured.not_relayed, went_direct)), (inbound, outbound)
        site.go_on(f"with {inbound} and {outbound}")


def test_listeners_come_and_go(site: Site) -> None:
    more = {"ports": "15002,15003,15006", "inbound-port": 15003}
    assert relayed(site)["gateway/v4"]["listener"] == "127.0.0.1:15006"
    said = site.configured.reload(**more)
    assert said["changed"] == "ports, inbound-port"
    lines = relayed(site)
    assert (lines["gateway/v4"]["listener"], lines["host/v6"]["listener"]) == ("127.0.0.1:15003", "[::1]:15003")
    assert lines["local/v6"]["listener"] == "[::1]:15002"
    with site.configured.connect() as stays:
        assert ping(stays) == ""
        site.configured.reload()
        assert relayed(site)["gateway/v4"]["listener"] == "127.0.0.1:15006"
        wait_until(lambda: not listens(site.lab, 15003), "nobody listens there any more")
        assert ping(stays) == ""


def listens(lab: Lab, port: int) -> bool:
    return bool(lab.relay.run(["ss", "-Hltn", f"sport = :{port}"]).stdout)


def test_addresses_to_listen_on_come_and_go(site: Site) -> None:
    address = (site.lab.relay.ipv4, 15006)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            site.lab.client.connect(*address)
        site.configured.reload(bind=f"127.0.0.1,::1,{address[0]}", target=f"{site.lab.server.ipv4}:{PORT}")
        with site.lab.client.connect(*address) as sock:
            assert ping(sock) == ""
            sock.shutdown(socket.SHUT_WR)
            assert site.configured.relay.record_of(sock)["listener"] == f"{address[0]}:15006"
        relayed(site)
        site.configured.reload()
        wait_until(lambda: attempt_to(site.lab.client, *address) == "ConnectionRefusedError", "it is closed")


def attempt_to(host: Host, address: str, port: int) -> str:
    try:
        host.connect(address, port).close()
    except OSError as error:
        return type(error).__name__
    return ""


def test_connect_timeout(site: Site) -> None:
    site.configured.reload(connect_timeout=0.4, intercept_inbound=f"{PORT},{SILENT}")
    with site.configured.connect(SILENT) as sock:
        assert ping(sock).startswith("ConnectionResetError")
        record = site.configured.relay.record_of(sock)
    assert record["outcome"] == "connect-timeout" and 0.3 < record["seconds"] < 3


@pytest.mark.parametrize("option", ["idle-timeout", "half-close-timeout"])
def test_idle_timeouts(site: Site, option: str) -> None:
    with site.configured.connect() as old:
        assert ping(old) == ""
        site.configured.reload(**{option: 0.3})
        with site.configured.connect() as sock, site.lab.server.listen(SILENT - 1) as other:
            assert ping(sock) == ""
            if option == "half-close-timeout":
                sock.close()
                site.configured.reload(**{option: 0.3}, intercept_inbound=f"{PORT},{SILENT - 1}")
                half = site.configured.connect(SILENT - 1)
                half.shutdown(socket.SHUT_WR)
                waits, _ = other.accept()
                with half, waits:
                    assert site.configured.relay.record_of(half)["outcome"] == option
            else:
                assert site.configured.relay.record_of(sock)["outcome"] == "idle"
        assert ping(old) == "", "it began when there was no such limit"


def visit_as_guest(lab: Lab, sock: socket.socket) -> str:
    """'' if it is served, else what went wrong."""
    sock.settimeout(5)
    sock.bind((GUEST, 0))
    try:
        sock.connect((lab.server.ipv4, PORT))
    except ConnectionResetError as error:  # which is quicker than the handshake is noticed
        return repr(error)
    return ping(sock)


def test_max_per_source(site: Site) -> None:
    lab, configured = site.lab, site.configured
    with contextlib.ExitStack() as stack:

        def come() -> str:
            sock = stack.enter_context(lab.client.socket())
            said = visit_as_guest(lab, sock)
            assert not said or configured.relay.record_of(sock)["outcome"] == "over-limit"
            return said

        configured.reload(max_per_source=2)
        assert [bool(come()) for _ in range(3)] == [False, False, True]
        configured.reload(max_per_source=3, workers=2)
        assert [bool(come()) for _ in range(2)] == [False, True], "those of the generation before count too"
        configured.reload()
        assert not come()


def test_max_connections(site: Site) -> None:
    configured = site.configured
    configured.reload(max_connections=len(site.transfers) + 1)
    with configured.connect() as one, configured.connect() as waits:
        assert ping(one) == ""
        waits.send(b"is there room?")
        configured.relay.wait_for_line(lambda line: line["message"] == "not accepting")
        site.go_on("when there is no more room")
        waits.setblocking(False)
        with pytest.raises(BlockingIOError):
            waits.recv(100)
        configured.reload()
        waits.settimeout(5)
        assert waits.recv(100) == b"is there room?"


def test_log_level(site: Site) -> None:
    configured = site.configured
    configured.reload(log_level="info")
    unseen = configured.visit(site.lab.client, site.lab.server)
    seen = configured.relay.wait_for_record(lambda record: record["client"] == unseen)
    assert seen["outcome"] == "completed"
    assert not any(
        line["message"] == "connection open" and line["client"] == unseen for line in configured.relay.lines()
    )
    configured.reload()
    relayed(site)


def test_log_format(site: Site) -> None:
    configured = site.configured
    before = len(configured.relay.log)
    configured.write(text_of(merged(configured.base, {"log-format": "console"})))
    configured.relay.signal(signal.SIGHUP)
    wait_until(lambda: "INFO reloaded generation=" in configured.relay.log[before:], "it says so in the new format")
    client = configured.visit(site.lab.client, site.lab.server)
    wait_until(lambda: f"client={client}" in configured.relay.log, "its workers write so too")
    configured.reload()
    relayed(site)


def test_log_file(site: Site, tmp_path: Path) -> None:
    configured, file = site.configured, tmp_path / "log"
    count = configured.rest()
    configured.write(text_of(merged(configured.base, {"log-file": str(file)})))
    configured.relay.signal(signal.SIGHUP)
    wait_until(lambda: file.exists() and '"reloaded"' in file.read_text(), "it says so there")
    client = configured.visit(site.lab.client, site.lab.server)
    wait_until(lambda: client in file.read_text(), "its workers write there too")
    assert client not in configured.relay.log
    configured.reload()
    relayed(site)
    wait_until(lambda: configured.count()[1] == count[1], "no descriptor is left over")


def test_workers(site: Site) -> None:
    configured = site.configured
    for number in (3, 1, 2):
        assert configured.reload(workers=number)["workers"] == number
        relayed(site)
        # And the one with the transfers.
        wait_until(lambda: len(configured.workers) == number + 1, "those of the generation before have ended")
        assert site.worker in configured.workers


def status(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    raise AssertionError(name)


def test_user(fresh_lab: Lab, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> None:
    """An account of their own takes the workers' last capability; the ruleset knows them by it, and no more by the mark
    of their sockets. Nobody who comes meanwhile is lost between the two."""
    if os.geteuid() or fresh_lab.user_namespace:
        require_or_skip("it takes root to have another account")
    lab, configured = fresh_lab, Configured(fresh_lab, tmp_path, for_all_accounts())
    with echoing(lab), configured.relay as relay, streams(lab.relay, lab.server.ipv6, PORT) as stays:
        with steady(lab.relay, lab.server.ipv4, PORT, 100) as come:
            for user, uid, capabilities in ((None, 0, 1 << 13), (65534, 65534, 0)):
                come.go_on(f"before user {user}")
                configured.reload(user=user)
                newest = configured.workers[-1]
                assert status(newest, "Uid").split() == [str(uid)] * 4
                assert (int(status(newest, "CapEff"), 16), status(newest, "NoNewPrivs")) == (capabilities, "1")
                assert configured.opened(lab.relay, lab.server)["id"].startswith(f"{newest:x}-")
                come.go_on(f"with user {user}")
                stays.go_on(f"with user {user}")
            why = configured.refused(text_of(configured.base))
            assert why.startswith("another account for workers that may not mark their sockets would end connections")
            last = come.finish()
            assert last["errors"] == {} and last["begun"] == last["served"], last
        assert stays.finish()["whole"] == 1
        relay.stop()
        assert {record["outcome"] for record in relay.records()} == {"completed"}


def test_preserve_source(fresh_lab: Lab, tmp_path: Path) -> None:
    """It may begin, where connections of this host are not intercepted; it cannot end."""
    lab, configured = fresh_lab, Configured(fresh_lab, tmp_path, intercept_outbound=None)
    with echoing(lab), configured.relay as relay, streams(lab.client, lab.server.ipv6, PORT) as stays:
        stays.go_on("at first")
        for preserve, seen in ((None, "relay"), ("address", "address"), ("full", "full")):
            configured.reload(preserve_source=preserve)
            with configured.connect() as sock:
                assert ping(sock) == ""
                sock.shutdown(socket.SHUT_WR)
                record = relay.record_of(sock)
                mine = from_sockaddr(sock.getsockname())
            assert record["source"] == seen
            host, _, port = record["upstream_local"].rpartition(":")
            assert (host == mine.host) == (seen != "relay") and (int(port) == mine.port) == (seen == "full")
            stays.go_on(f"with preserve-source {preserve}")
        why = configured.refused(text_of(configured.base))
        assert why.startswith("no longer preserving source addresses would end connections that the relay has")
        configured.opened(lab.client, lab.server)
        assert stays.finish()["whole"] == 1
        relay.stop()


def test_keepalive(site: Site) -> None:
    lab, configured = site.lab, site.configured
    for seconds, minutes in ((7200, "119min"), (0, None), (3600, "59min")):
        configured.reload(keepalive=seconds)
        with configured.connect() as sock:
            assert ping(sock) == ""
            mine = str(from_sockaddr(sock.getsockname()))
            opened = configured.relay.wait_for_line(
                lambda line: line["message"] == "connection open" and line["client"] == mine
            )
            for end in (f"dst {mine}", f"src {opened['upstream_local']}"):
                timer = lab.relay.run(["ss", "-Htno", end]).stdout
                assert timer and (f"timer:(keepalive,{minutes}" in timer if minutes else "timer" not in timer), timer


# --- what is refused


BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "unknown key": ({"connect-timeuot": 3}, r"relay.conf:7: unknown setting 'connect-timeuot' \(did you mean"),
    "bad value": ({"connect-timeout": "soon"}, r"relay.conf:7: connect-timeout: .*soon"),
    "contradiction": ({"inbound-port": 15009}, r"inbound-port 15009, which is not in ports .*relay.conf:7"),
    "own port": ({"intercept-inbound": "15000-15010"}, r"has the relay's own port 15002 in it.*relay.conf:1"),
    "port taken": ({"ports": "15002,15006,15008"}, r"cannot listen on 127.0.0.1:15008: the port is taken"),
    "no such address": ({"bind": "127.0.0.1,::1,10.99.9.9"}, r"cannot listen on 10.99.9.9:15002: no interface has"),
    "unresolvable": ({"target": "nowhere.invalid:1"}, r"target: cannot resolve 'nowhere.invalid'"),
    "mode": (
        {"mode": "redirect", "intercept-inbound": None},
        r"^mode: live connections depend on it, so a reload cannot change it; restart",
    ),
    "interface": ({"interface": "rc", "intercept-outbound": None}, r"^interface: .*restart"),
    "backend": ({"backend": "iptables-nft"}, r"^backend: .*restart"),
    "mark-mask": ({"mark-mask": "0x70000000"}, r"^mark-mask: .*restart"),
    "route-table": ({"route-table": 7008}, r"^route-table: .*restart"),
    "route-priority": ({"route-priority": 7008}, r"^route-priority: .*restart"),
    "no interception": ({"intercept-inbound": None, "intercept-outbound": None}, r"cannot end interception; restart"),
    "no such user": ({"user": "mr-nobody"}, r"user: there is no account 'mr-nobody'"),
    "log file": ({"log-file": "/nowhere/log"}, r"cannot write log file /nowhere/log"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.row("H19", "reload with a broken file", "the old settings stay; one error with its line")
def test_a_broken_file_leaves_everything_as_it_is(module_site: Site, name: str, seen: Seen) -> None:
    changes, why = BROKEN[name]
    site = module_site  # whatever is in force
    check_refusal(site, text_of(merged(site.configured.base, changes)), why)
    seen("as before; one error")


def check_refusal(site: Site, text: str, why: str) -> None:
    configured, lab = site.configured, site.lab
    wait_until(lambda: len(configured.workers) == 2, "the one in force, and the one with the transfers")
    with lab.relay.listen(15008):
        count, workers, rules = configured.rest(), configured.workers, look(lab)
        for _ in range(2):
            assert_matches(configured.refused(text), why)
        configured.comes_back_to(count)
        assert (configured.workers, look(lab)) == (workers, rules)
    newest = configured.workers[-1]
    assert configured.opened(lab.client, lab.server)["id"].startswith(f"{newest:x}-")
    configured.reload(connect_timeout=9)
    relayed(site)
    site.go_on("afterwards")


def assert_matches(said: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(said)


def test_a_file_that_is_no_text(site: Site) -> None:
    site.configured.file.write_bytes(b"ports = 15002,15006\n# \xff\n")
    assert_matches(str(site.configured.hang_up("reload refused")["why"]), r"relay.conf:2: not UTF-8 text")
    site.configured.file.unlink()
    said = str(site.configured.hang_up("reload refused")["why"])
    assert said == f"cannot read {site.configured.file}: No such file or directory"
    site.configured.file.mkdir()
    try:
        said = str(site.configured.hang_up("reload refused")["why"])
        assert said == f"cannot read {site.configured.file}: Is a directory"
    finally:
        site.configured.file.rmdir()
    site.configured.reload()
    relayed(site)


@pytest.fixture
def unreadable() -> Iterator[Path]:
    """A folder with the package, which everybody finds, and with a program of the workers that only we can read."""
    folder = Path(tempfile.mkdtemp(prefix="tproxy-relay-test-"))  # pytest's own folders are closed to others
    try:
        package, ignore = folder / "tproxy_relay", shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(tproxy_relay.__file__).parent, package, ignore=ignore)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        (package / "worker" / "__main__.py").chmod(0o600)
        yield folder
    finally:
        shutil.rmtree(folder)


def test_a_worker_that_cannot_boot(
    fresh_lab: Lab, tmp_path: Path, unreadable: Path, require_or_skip: Callable[[str], NoReturn]
) -> None:
    """The account may not read the program. The old workers stay."""
    if os.geteuid() or fresh_lab.user_namespace:
        require_or_skip("it takes root to have another account")
    program = f"PYTHONPATH={unreadable}"
    as_nobody = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--", sys.executable)
    importing = ("env", "-C", "/", program, *as_nobody, "-c", "import tproxy_relay.worker.__main__")
    assert fresh_lab.relay.run(importing, check=False).returncode, "the account finds the program elsewhere"
    configured = Configured(fresh_lab, tmp_path, wrapper=("env", "-C", "/", program))
    with echoing(fresh_lab), configured.relay as relay:
        count, workers = configured.rest(), configured.workers
        for _ in range(2):
            why = configured.refused(
                text_of(merged(configured.base, {"user": "65534", "workers": 2, "ports": "15002,15003,15006"}))
            )
            assert why.startswith("a worker could not start (exit 1"), why
            configured.comes_back_to(count)
        assert configured.workers == workers and relay.returncode is None
        configured.opened(fresh_lab.client, fresh_lab.server)
        configured.reload(workers=2)
        configured.opened(fresh_lab.client, fresh_lab.server)
        relay.stop()


# --- more than a change of settings


def test_workers_that_die_before_a_reload_are_not_made_good_after_it(fresh_lab: Lab, tmp_path: Path) -> None:
    """The next one was to start in a moment; the new generation is complete without it."""
    lab, configured = fresh_lab, Configured(fresh_lab, tmp_path)
    with echoing(lab), configured.relay as relay:
        for deaths in range(1, 5):
            wait_until(lambda: configured.workers and configured.workers == relay.workers, "there is one")
            os.kill(relay.worker, signal.SIGKILL)
            wait_until(lambda: configured.times("worker ended") == deaths, "its end is known")
        configured.reload()
        assert configured.rest(1.0)[2] == 1
        configured.opened(lab.client, lab.server)
        relay.stop()


def test_interception_may_begin_with_a_reload(fresh_lab: Lab, tmp_path: Path) -> None:
    lab, before = fresh_lab, look(fresh_lab)
    configured = Configured(lab, tmp_path, intercept_inbound=None, intercept_outbound=None)
    with echoing(lab), configured.relay as relay:
        earlier = [configured.visit(*ends) for ends in ways(lab).values()]
        configured.reload(intercept_outbound=PORT)
        configured.opened(lab.relay, lab.server)
        earlier.append(configured.visit(lab.client, lab.server))
        configured.reload(intercept_outbound=PORT, intercept_inbound=PORT)
        configured.opened(lab.client, lab.server)
        configured.opened(lab.client, lab.relay)
        assert all(map(configured.not_relayed, earlier))
        relay.stop()
    assert look(lab) == before


@pytest.mark.parametrize("became", ["open", "closed"])
def test_on_failure(fresh_lab: Lab, tmp_path: Path, rules: Callable[..., str], became: str) -> None:
    lab = fresh_lab
    configured = Configured(lab, tmp_path, on_failure="closed" if became == "open" else "open")
    with echoing(lab), configured.relay as relay:
        configured.reload(on_failure=became)
        configured.opened(lab.client, lab.server)
        relay.kill()
        wait_until(lambda: not processes(lab, "-m tproxy_relay"), "the guard has done its work")
        wanted = "" if became == "open" else "ConnectionRefusedError"
        assert [attempt(*ends, socket.AF_INET) for ends in ways(lab).values()] == [wanted] * 3
        rules(lab, "remove")


def test_drain_timeout(fresh_lab: Lab, tmp_path: Path) -> None:
    """Also for connections that began long before."""
    lab, configured = fresh_lab, Configured(fresh_lab, tmp_path)
    with echoing(lab), configured.relay as relay, configured.connect() as stays:
        assert ping(stays) == ""
        configured.reload(drain_timeout=0.3)
        relay.stop(timeout=8)
        assert ping(stays).startswith("ConnectionResetError")
        assert relay.record_of(stays)["outcome"] == "drained"


def test_a_handshake_that_is_under_way_to_a_listener_that_goes(fresh_lab: Lab, tmp_path: Path) -> None:
    """Its last part comes when the others have been told to stop."""
    lab, configured = fresh_lab, Configured(fresh_lab, tmp_path, ports="15002,15003,15006", inbound_port=15003)
    hold_back = f"table inet late {{ chain output {{ type filter hook output priority 0; tcp dport {PORT} drop; }}; }}"
    with echoing(lab), configured.relay as relay:
        configured.opened(lab.client, lab.server)
        ack_only = hold_back.replace("drop", "tcp flags & (syn | ack) == ack drop")
        lab.client.run(["nft", "-f", "-"], input=ack_only)
        with configured.connect() as late:
            assert "SYN-RECV" in lab.relay.run(["ss", "-tan"]).stdout
            configured.reload(ports="15002,15006", inbound_port=15006)
            lab.client.run(["nft", "delete", "table", "inet", "late"])
            assert ping(late) == ""
            late.shutdown(socket.SHUT_WR)
            assert relay.record_of(late)["listener"] == "127.0.0.1:15003"
        assert configured.opened(lab.client, lab.server)["listener"] == "127.0.0.1:15006"
        relay.stop()


def test_the_service_manager_hears_of_it(fresh_lab: Lab, tmp_path: Path) -> None:
    with ServiceManager(tmp_path) as manager:
        configured = Configured(fresh_lab, tmp_path, wrapper=manager.wrapper)
        with echoing(fresh_lab), configured.relay as relay:
            began = time.monotonic_ns() // 1000
            configured.reload(connect_timeout=3)
            manager.wait_for("READY", 2)
            configured.refused("nonsense")
            manager.wait_for("READY", 3)
            configured.opened(fresh_lab.client, fresh_lab.server)
            relay.stop()
        states = manager.wait_for("STOPPING", 1)
    assert [next(iter(state)) for state in states] == ["READY", "RELOADING", "READY", "RELOADING", "READY", "STOPPING"]
    moments = [int(state["MONOTONIC_USEC"]) for state in states if "RELOADING" in state]
    assert began < moments[0] < moments[1] < time.monotonic_ns() // 1000


# --- very many


@contextlib.contextmanager
def crowd(lab: Lab, configured: Configured) -> Iterator[None]:
    """500 live connections with data on all of them, and new ones all the time: nothing of it gets lost. Afterwards
    everything is back at its count."""
    with echo_server(lab.server, PORT, PORT), configured.relay as relay:
        count = configured.rest()
        with (
            streams(lab.client, lab.server.ipv4, PORT, 500, size=1000, pause=0.7) as stay,
            steady(lab.client, lab.server.ipv6, PORT, 20) as come,
        ):
            wait_until(lambda: stay.ask()["rounds"] > 1, "data flows on all of them", 30)
            assert sum(line["message"] == "connection open" for line in relay.lines()) >= 500
            yield
            stay.go_on("after all of it")
            last = come.finish()
            assert last["errors"] == {} and last["begun"] == last["served"], last
            last = stay.finish()
            assert (last["whole"], last["errors"]) == (500, {}), last
        configured.comes_back_to(count)
        outcomes = {record["outcome"] for record in relay.records()}
        assert outcomes <= {"completed", "over-limit"}
        relay.stop()


LAST: dict[str, object] = {"max-per-source": 3, "connect-timeout": 7}
"""The changes of the last file; only that one has another connect-timeout."""


def check_last_one(configured: Configured, lab: Lab, least: int, hups: int) -> None:
    """The file that was written last is in force: so many connections from one address, and no more. Reloads that are
    asked for during one are one more."""
    lab.client.run(["ip", "address", "add", f"{GUEST}/24", "dev", "cr"])
    configured.relay.wait_for_line(
        lambda line: line["message"] == "reloaded" and "connect-timeout" in line["changed"], 30
    )
    with contextlib.ExitStack() as stack:

        assert [bool(visit_as_guest(lab, stack.enter_context(lab.client.socket()))) for _ in range(4)] == [
            False
        ] * 3 + [True]
    assert least <= configured.times("reloaded") <= hups


def test_a_hundred_reloads_in_ten_seconds(fresh_lab: Lab, tmp_path: Path) -> None:
    configured = Configured(fresh_lab, tmp_path, intercept_outbound=None, workers=2, max_per_source=1000)
    with crowd(fresh_lab, configured):
        began = time.monotonic()
        number = 0

        def again(changes: dict[str, object]) -> None:
            configured.write(text_of(merged(configured.base, changes)))
            configured.relay.signal(signal.SIGHUP)

        while number < 99 or configured.times("reloaded") < 19:
            again({"max-per-source": 1000 + number})
            number += 1
            wait_until(lambda: time.monotonic() > began + number / 10, "a tenth of a second")
            assert number < 1000, f"{configured.times('reloaded')} reloads after {number} requests"
        again(LAST)
        check_last_one(configured, fresh_lab, 20, number + 1)


@pytest.mark.row("H18", "5,000 HUPs in 3 s beside 500 streams", "no connection lost, the last file in force")
def test_five_thousand_hups_in_three_seconds(fresh_lab: Lab, tmp_path: Path, seen: Seen) -> None:
    configured = Configured(fresh_lab, tmp_path, intercept_outbound=None, workers=2, max_per_source=1000)
    with crowd(fresh_lab, configured):
        began = time.monotonic()
        for number in range(5000):
            if number == 4990:
                configured.write(text_of(merged(configured.base, LAST)))
            configured.relay.signal(signal.SIGHUP)
            wait_until(lambda: time.monotonic() > began + number * 3 / 5000, "its moment")
        check_last_one(configured, fresh_lab, 2, 5000)
    seen("500 of 500 whole; the last one")
