"""The whole process: real signals, real exits, also with threads that will not return and as PID 1."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import children
import loopback
import pytest
from deadlines import PATIENCE, wait_until
from loopback import RST

from tproxy_relay import service
from tproxy_relay.endpoint import Endpoint
from tproxy_relay.errors import CapabilityMissingError, ConfigError
from tproxy_relay.settings import HostPort, PortRange, Settings

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

RUN = """
import json, os, sys
from tproxy_relay import service
from tproxy_relay.errors import RelayError
from tproxy_relay.settings import HostPort, Settings

given = json.loads(sys.argv[1])
given["target"] = HostPort(*given["target"])
try:
    service.run(Settings(bind=("127.0.0.1",), ports=(0,), mode="redirect", log_format="json", **given), os.environ)
except RelayError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Service:
    """A relay in a process of its own, with its log and the NOTIFY_SOCKET it talks to."""

    def __init__(self, child: "subprocess.Popen[str]", manager: socket.socket, server: socket.socket) -> None:
        self.child, self._manager, self.server = child, manager, server
        self.log: list[dict[str, object]] = []
        self.raw: list[str] = []
        self._reader = threading.Thread(target=self._read, name="log reader")
        self._reader.start()
        assert manager.recv(100) == b"READY=1"
        (listening,) = self.lines("listening")
        host, _, port = str(listening["listeners"]).rpartition(":")
        self.address = (host, int(port))

    def _read(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.raw.append(line)
            if line.startswith("{"):
                self.log.append(json.loads(line))

    def lines(self, message: str, count: int = 1) -> list[dict[str, object]]:
        """The lines with this message, once there are so many."""
        wait_until(
            lambda: sum(line["message"] == message for line in list(self.log)) >= count, f"{message}: {self.raw}"
        )
        return [line for line in list(self.log) if line["message"] == message]

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client and the server's end, relayed."""
        client = loopback.dial(self.address)
        server, _ = self.server.accept()
        server.settimeout(PATIENCE)
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        return client, server

    def stopping(self) -> None:
        """It has said so."""
        assert self._manager.recv(100) == b"STOPPING=1"

    def exit_code(self, seconds: float = PATIENCE) -> int:
        """The code, once it has ended."""
        code = self.child.wait(seconds)
        self._reader.join(PATIENCE)
        return code

    def join(self) -> None:
        """After the process is gone, however that came."""
        self._reader.join(PATIENCE)
        assert not self._reader.is_alive()


@contextmanager
def serving(tmp_path: Path, prefix: tuple[str, ...] = (), before: str = "", **settings: object) -> Iterator[Service]:
    """A service with a target of ours. `before` is code that its process runs first."""
    with ExitStack() as stack:
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.settimeout(15)
        manager.bind(str(tmp_path / "notify"))
        server = stack.enter_context(loopback.listen())
        given = {"target": list(server.getsockname()), **settings}
        notified = ("env", f"NOTIFY_SOCKET={tmp_path / 'notify'}")
        child = stack.enter_context(
            children.running_python(before + RUN, json.dumps(given), prefix=(*notified, *prefix))
        )
        service = Service(child, manager, server)
        try:
            yield service
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(PATIENCE)
            service.join()


def test_a_life(tmp_path: Path) -> None:
    with serving(tmp_path) as relay:
        client, server = relay.connect()
        relay.child.send_signal(signal.SIGUSR1)
        assert relay.lines("connection live")[0]["state"] == "open"
        relay.child.send_signal(signal.SIGHUP)
        relay.lines("settings are read at start only: restart to change them")
        relay.child.send_signal(signal.SIGTERM)
        relay.stopping()
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        client.close()
        server.close()
        assert relay.exit_code() == 0
        assert relay.lines("connection closed")[0]["outcome"] == "completed"
        assert relay.log[-1]["message"] == "stopped"
        assert relay.log[-1]["closed"] == {"completed": 1}


def test_a_second_term_ends_the_drain(tmp_path: Path) -> None:
    with serving(tmp_path) as relay:
        client, server = relay.connect()
        with client, server:
            relay.child.send_signal(signal.SIGTERM)
            relay.lines("draining")
            relay.child.send_signal(signal.SIGTERM)
            assert relay.exit_code(3) == 0
            assert relay.lines("connection closed")[0]["outcome"] == "aborted"
            assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST


@pytest.mark.parametrize("stuck_in", ["recv", "send"])
def test_no_thread_keeps_it_from_ending(tmp_path: Path, stuck_in: str) -> None:
    with serving(tmp_path) as relay:
        client, server = relay.connect()
        with client, server:
            if stuck_in == "send":
                loopback.fill(client)
                loopback.fill(server)
            began = time.monotonic()
            relay.child.send_signal(signal.SIGINT)
            assert relay.exit_code(4) == 0
            assert time.monotonic() - began < 3
            assert relay.lines("connection closed")[0]["outcome"] == "aborted"
            wait_until(lambda: loopback.is_reset(client) and loopback.is_reset(server), "both are reset")


NEVER_BACK = """
import time
from tproxy_relay import orig_dst
orig_dst.original_destination = lambda *_: time.sleep(600)
"""


def test_a_thread_that_never_returns_does_not_keep_it_from_ending_either(tmp_path: Path) -> None:
    """The interpreter would wait for it: concurrent.futures joins its threads at exit."""
    with serving(tmp_path, before=NEVER_BACK) as relay, loopback.dial(relay.address) as client:
        wait_until(lambda: usr1_shows(relay, live=1), "it is accepted")
        relay.child.send_signal(signal.SIGINT)
        assert relay.exit_code(4) == 0
        (line,) = relay.lines("connection closed")
        assert (line["outcome"], line["error"]) == ("aborted", "its threads did not end in time")
        assert loopback.read_to_end(client)[1] == RST


def usr1_shows(relay: Service, live: int) -> bool:
    """True if it says that it has so many connections."""
    before = sum(line["message"] == "connections" for line in list(relay.log))
    relay.child.send_signal(signal.SIGUSR1)
    return relay.lines("connections", before + 1)[-1]["live"] == live


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_relay_that_dies_resets_both_sides(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as relay:
        client, server = relay.connect()
        with client, server:
            client.sendall(bytes(50_000))
            server.sendall(bytes(50_000))
            loopback.read_exactly(client, 50_000)
            loopback.read_exactly(server, 50_000)
            half_client, half_server = relay.connect()
            with half_client, half_server:
                half_client.shutdown(socket.SHUT_WR)
                assert half_server.recv(1) == b""
                relay.child.send_signal(number)
                relay.child.wait(PATIENCE)
                assert loopback.read_to_end(half_client)[1] == RST
                wait_until(lambda: loopback.is_reset(half_server), "it is reset")
            assert loopback.read_to_end(client) == loopback.read_to_end(server) == (b"", RST)


def test_as_pid_1_it_obeys_and_reaps(tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> None:
    """A process ignores the signals that it has no handler for when it is PID 1."""
    prefix = children.need(("unshare", "-Ur", "--pid", "--fork", "--kill-child", "--mount-proc"), require_or_skip)
    with serving(tmp_path, prefix) as relay:
        children_of = Path(f"/proc/{relay.child.pid}/task/{relay.child.pid}/children")
        pid = int(children_of.read_text().split()[0])
        client, server = relay.connect()
        with client, server:
            os.kill(pid, signal.SIGTERM)
            relay.lines("draining")
            os.kill(pid, signal.SIGTERM)
            assert relay.exit_code() == 0


def test_it_sleeps_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    with serving(tmp_path, idle_timeout=60.0) as relay:
        client, server = relay.connect()
        with client, server:

            def switches() -> int:
                status = Path(f"/proc/{relay.child.pid}/status").read_text()
                return int(status.split("voluntary_ctxt_switches:")[1].split()[0])

            before = switches()
            time.sleep(0.5)  # the length of the measurement
            assert switches() - before < 5


# --- before READY


def test_a_target_that_does_not_resolve() -> None:
    with pytest.raises(ConfigError, match="target: cannot resolve 'no.such.host.invalid'") as caught:
        service._resolve_target(Settings(target=HostPort("no.such.host.invalid", 80)))
    assert caught.value.exit_code == 78


def test_a_target_is_looked_up_once() -> None:
    assert service._resolve_target(Settings()) is None
    assert service._resolve_target(Settings(target=HostPort("127.0.0.1", 80))) == Endpoint("127.0.0.1", 80)
    assert service._resolve_target(Settings(target=HostPort("::1", 80))) == Endpoint("::1", 80)


RIGHTS = """
import sys
from tproxy_relay import service
from tproxy_relay.errors import RelayError
from tproxy_relay.settings import Settings
print(*(hex(service._usable_mark(Settings(mark_mask=mask))) for mask in (0x07000000, 0xE0000000, 0x7)))
for word in ("no", "address", "full"):
    try:
        service._check_preserve_source(Settings(preserve_source=word))
        print("fine")
    except RelayError as error:
        print(error.exit_code)
"""


def test_with_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    ran = children.run_python(RIGHTS, prefix=children.need(children.NETWORK, require_or_skip))
    assert (ran.stdout, ran.stderr) == ("0x4000000 0x80000000 0x4\nfine\nfine\nfine\n", "")


def test_without_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    ran = children.run_python(RIGHTS, prefix=prefix)
    assert (ran.stdout, ran.stderr) == ("0x0 0x0 0x0\nfine\n77\n77\n", "")
    assert CapabilityMissingError.exit_code == 77


HTTP = (PortRange(80, 80),)


def test_without_ports_to_intercept_there_is_no_ruleset() -> None:
    assert service._intercept(Settings(), mark=0, own_ports=frozenset()) is None


@pytest.mark.parametrize(
    "settings, error, why",
    [
        (Settings(intercept_inbound=HTTP), ConfigError, "none of the inherited sockets listens on port 15006"),
        (
            Settings(intercept_outbound=HTTP, user="no-such-account"),
            ConfigError,
            "there is no account 'no-such-account'",
        ),
        (
            Settings(intercept_outbound=HTTP, user=str(os.geteuid() + 1)),
            ConfigError,
            "but this process runs as account",
        ),
        (
            Settings(intercept_outbound=HTTP),
            CapabilityMissingError,
            "outbound interception would catch the relay itself",
        ),
    ],
)
def test_interception_that_cannot_work_is_refused_before_anything_is_done(
    settings: Settings, error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        service._intercept(settings, mark=0, own_ports=frozenset({15002}))


def test_a_taken_port_ends_the_start_with_its_code() -> None:
    with loopback.listen() as taken:
        code = RUN.replace("ports=(0,)", f"ports=({taken.getsockname()[1]},)")
        ran = children.run_python(code, json.dumps({"target": ["127.0.0.1", 9]}))
    assert ran.returncode == 71
    assert "the port is taken" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
