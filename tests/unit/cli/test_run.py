"""The whole relay, with its workers: real signals, real exits, also with threads that will not return and as PID 1."""

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
from rows import Seen

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

RUN = """
import json, os, sys
from tproxy_relay.cli import run as service
from tproxy_relay.errors import RelayError
from tproxy_relay.settings import HostPort, Settings

given = json.loads(sys.argv[1])
given = {"workers": 1, **given, "target": HostPort(*given["target"])}
try:
    settings = Settings(bind=("127.0.0.1",), ports=(0,), mode="redirect", log_format="json", **given)
    service.run(settings, lambda: settings, os.environ, take_over=False)
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
        self.told("READY=1")
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

    def told(self, state: str) -> None:
        """It has told the service manager so. Its listeners are stored there too, and it shows signs of life."""
        while not (told := self._manager.recv(200).decode()).startswith(state):
            assert told.startswith(("FDSTORE=1", "WATCHDOG=1")), told

    @property
    def workers(self) -> list[int]:
        """The pids of the workers that were ever started."""
        return [int(str(line["pid"])) for line in self.lines("worker started")]

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
        assert relay.lines("connections")[0]["live"] == 1
        relay.child.send_signal(signal.SIGHUP)
        relay.told("RELOADING=1\nMONOTONIC_USEC=")
        relay.told("READY=1")
        assert [line["generation"] for line in relay.lines("reloaded")] == [2]
        relay.child.send_signal(signal.SIGTERM)
        relay.told("STOPPING=1")
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        client.close()
        server.close()
        assert relay.exit_code() == 0
        assert relay.lines("connection closed")[0]["outcome"] == "completed"
        assert relay.log[-1]["message"] == "stopped"
        assert relay.log[-1]["closed"] == {"completed": 1}
        assert relay.log[-1]["log_dropped"] == 0


@pytest.mark.row("H7", "TERM twice", "the second one ends it at once")
def test_a_second_term_ends_the_drain(tmp_path: Path, seen: Seen) -> None:
    with serving(tmp_path) as relay:
        client, server = relay.connect()
        with client, server:
            relay.child.send_signal(signal.SIGTERM)
            relay.lines("draining")
            relay.child.send_signal(signal.SIGTERM)
            assert relay.exit_code(3) == 0
            assert relay.lines("connection closed")[0]["outcome"] == "aborted"
            assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST
    seen("at once")


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
from tproxy_relay.net import orig_dst
orig_dst.original_destination = lambda *_: time.sleep(600)
"""


def test_a_thread_that_never_returns_does_not_keep_it_from_ending_either(tmp_path: Path) -> None:
    """The interpreter would wait for it: concurrent.futures joins its threads at exit."""
    (tmp_path / "sitecustomize.py").write_text(NEVER_BACK, encoding="utf-8")  # the workers load it too (site)
    path = f"PYTHONPATH={tmp_path}{os.pathsep}{children.environment()['PYTHONPATH']}"
    with serving(tmp_path, ("env", path)) as relay, loopback.dial(relay.address) as client:
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


@pytest.mark.parametrize("victim", ["supervisor", "worker"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_relay_that_dies_resets_both_sides(tmp_path: Path, number: signal.Signals, victim: str) -> None:
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
                os.kill(relay.child.pid if victim == "supervisor" else relay.workers[0], number)
                assert loopback.read_to_end(half_client)[1] == RST
                wait_until(lambda: loopback.is_reset(half_server), "it is reset")
            assert loopback.read_to_end(client) == loopback.read_to_end(server) == (b"", RST)
        if victim == "supervisor":
            assert relay.child.wait(PATIENCE) == -number
        else:
            (ended,) = relay.lines("worker ended")
            assert (ended["pid"], ended["how"], ended["live"]) == (relay.workers[0], f"signal {int(number)}", 2)
            for end in relay.connect():  # served by the next one
                end.close()


@pytest.mark.row("H24", "as process 1", "TERM ends it; children are reaped")
@pytest.mark.parametrize(("seconds", "early"), [(0.7, False), (0, True)], ids=["ends later", "has ended before"])
def test_as_pid_1_it_obeys_and_reaps(
    tmp_path: Path, require_or_skip: Callable[[str], NoReturn], seen: Seen, seconds: float, early: bool
) -> None:
    """A process ignores the signals that it has no handler for when it is PID 1, and inherits everybody's children."""
    prefix = children.need(("unshare", "-Ur", "--pid", "--fork", "--kill-child", "--mount-proc"), require_or_skip)
    before = f"""
import os, subprocess
subprocess.run(["sh", "-c", "sleep {seconds} >/dev/null 2>&1 &"])
os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | (0 if {early} else os.WNOHANG))
"""
    with serving(tmp_path, prefix, before) as relay:
        pid = int(Path(f"/proc/{relay.child.pid}/task/{relay.child.pid}/children").read_text().split()[0])
        children_of = Path(f"/proc/{pid}/task/{pid}/children")
        wait_until(lambda: len(children_of.read_text().split()) == 1, "only its worker is left")
        client, server = relay.connect()
        with client, server:
            os.kill(pid, signal.SIGTERM)
            relay.lines("draining")
            os.kill(pid, signal.SIGTERM)
            assert relay.exit_code() == 0
    seen("ended; reaped")


def test_it_sleeps_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    with serving(tmp_path, idle_timeout=60.0) as relay:
        client, server = relay.connect()
        with client, server:

            def switches(pid: int) -> int:
                status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
                return int(status.split("voluntary_ctxt_switches:")[1].split()[0])

            pids = [relay.child.pid, *relay.workers]
            before = [switches(pid) for pid in pids]
            time.sleep(0.5)  # the length of the measurement
            assert all(switches(pid) - count < 5 for pid, count in zip(pids, before))


# --- several processes


def test_several_workers_are_one_relay(tmp_path: Path) -> None:
    with serving(tmp_path, workers=3) as relay:
        assert relay.lines("listening")[0]["workers"] == len(relay.workers) == 3
        peers: list[tuple[socket.socket, socket.socket]] = []
        pids: set[int] = set()
        told = 0
        while pids != set(relay.workers):  # the kernel wakes whom it likes
            assert len(peers) < 120, "each has a share"
            peers += [relay.connect() for _ in range(12)]
            relay.child.send_signal(signal.SIGUSR1)
            told += len(peers)
            live = relay.lines("connection live", told)[-len(peers) :]
            pids = {int(str(line["id"]).partition("-")[0], 16) for line in live}
        count = len(peers)
        assert relay.lines("connections", count // 12)[-1]["live"] == count
        for client, server in peers:
            client.close()
            server.close()
        relay.child.send_signal(signal.SIGTERM)
        assert relay.exit_code() == 0
        assert relay.log[-1] | {"closed": {"completed": count}, "accepted": count, "live": 0} == relay.log[-1]


def test_signals_to_all_of_its_processes_are_signals_to_the_relay(tmp_path: Path) -> None:
    """As Ctrl-C in a terminal sends them, and some service managers."""
    with serving(tmp_path, workers=2) as relay:
        client, server = relay.connect()
        with client, server:
            for pid in relay.workers:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    os.kill(pid, number)
            relay.child.send_signal(signal.SIGTERM)
            relay.lines("draining")
            client.sendall(b"still")
            assert loopback.read_exactly(server, 5) == b"still"
            os.killpg(relay.child.pid, signal.SIGINT)
            assert relay.exit_code(4) == 0
        assert not [line for line in relay.log if line["message"] == "worker ended" and line["how"] != "exit 0"]


# --- before READY


def test_a_taken_port_ends_the_start_with_its_code() -> None:
    with loopback.listen() as taken:
        code = RUN.replace("ports=(0,)", f"ports=({taken.getsockname()[1]},)")
        ran = children.run_python(code, json.dumps({"target": ["127.0.0.1", 9]}))
    assert ran.returncode == 71
    assert "the port is taken" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
