"""One real worker: the program that it runs, how it ends, what it may say, and where its threads run."""

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import children
import loopback
import pytest
from deadlines import wait_until
from hands import Hands
from loopback import RST

from tproxy_relay.errors import ConfigError, RelayError, SystemRefusedError
from tproxy_relay.ipc.scoreboard import SLOTS, Numbers
from tproxy_relay.relay.read_buffer import ESTABLISHED
from tproxy_relay.supervisor.worker_process import Stage


def test_it_runs_the_right_program_with_nothing_else(hands: Hands) -> None:
    """Its descriptors: the channel, the two pipes, the listener, the scoreboard (by the channel), its own."""
    (worker,) = hands.serving()
    environ = dict(
        entry.split("=", 1) for entry in Path(f"/proc/{worker.pid}/environ").read_text().split("\0") if "=" in entry
    )
    assert (environ["LISTEN_FDS"], environ["LISTEN_PID"]) == ("1", str(worker.pid))
    assert os.readlink(f"/proc/{worker.pid}/cwd") == "/", "no file system is kept busy"
    open_ones = [os.readlink(f"/proc/{worker.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{worker.pid}/fd")]
    kinds = sorted(name.partition(":")[0] for name in open_ones if not name.startswith("/memfd:tproxy-relay"))
    scoreboard, epoll, wakeup = ["anon_inode"], ["anon_inode"], ["socket", "socket"]
    assert kinds == sorted(["socket", "pipe", "pipe", "socket", *scoreboard, *epoll, *wakeup])
    listener = hands.generation.listeners[0].sock
    assert os.fstat(listener.fileno()).st_ino == os.stat(f"/proc/{worker.pid}/fd/3").st_ino


def test_the_service_manager_is_the_supervisors(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "KEPT"):
        monkeypatch.setenv(name, "x")
    (worker,) = hands.serving()
    variables = Path(f"/proc/{worker.pid}/environ").read_bytes().decode(errors="replace").split("\0")
    environ = dict(one.split("=", 1) for one in variables if one)
    assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(environ) == set()
    assert environ["KEPT"] == "x"
    assert environ["PYTHONPATH"].split(os.pathsep)[0] == str(children.ROOT)


def test_it_is_stopped(hands: Hands) -> None:
    (worker,) = hands.serving()
    client, server = hands.connect()
    worker.stop()
    assert hands.ended(worker) == "exit 0"
    assert loopback.read_to_end(client) == loopback.read_to_end(server) == (b"", RST)
    assert hands.workers.numbers == Numbers(1, 0, {"aborted": 1})


def test_it_is_stopped_before_it_was_told_to_serve(hands: Hands) -> None:
    (worker,) = hands.start()
    hands.ready(worker)
    worker.stop()
    assert hands.ended(worker) == "exit 0"


def test_one_that_crashes_says_why(hands: Hands) -> None:
    (worker,) = hands.serving()
    os.kill(worker.pid, signal.SIGSEGV)
    assert hands.ended(worker) == "signal 11"
    wait_until(lambda: hands.logged("a worker has said"), "its last words")
    said = hands.logged("a worker has said")
    assert {one["pid"] for one in said} == {worker.pid}
    assert "Segmentation fault" in str(said[0]["text"])


# --- workers that cannot boot


def failure(hands: Hands, **changed: Any) -> RelayError:
    """Of a worker that is started with this."""
    (worker,) = hands.start(**changed)
    how = hands.ended(worker)
    assert worker.stage is Stage.STARTING
    return worker.why_it_failed(how)


def test_one_that_finds_something_wrong(hands: Hands) -> None:
    error = failure(hands, mode="tproxy")
    assert type(error) is SystemRefusedError
    assert "inherited descriptor 3 is not transparent" in str(error)
    assert hands.how.popitem()[1] == "exit 71"


@pytest.mark.parametrize(
    ("becoming", "why"),
    [
        (("sh", "-c", "echo all >&2; echo is lost >&2; exit 3"), "(exit 3): is lost"),
        (("sh", "-c", "kill -9 $$"), "(signal 9): it said nothing"),
        (("no-such-program-anywhere",), "(exit 1): FileNotFoundError: [Errno 2] No such file or directory"),
    ],
)
def test_one_that_never_becomes_a_worker(hands: Hands, becoming: tuple[str, ...], why: str) -> None:
    error = failure(hands, command=becoming)
    assert (str(error), type(error)) == (f"a worker could not start {why}", SystemRefusedError)


FAIL = """
import socket
channel = socket.socket(fileno=0)
channel.recv(1 << 17)
channel.send(b'{"event": "failed", "message": "wrong", "exit_code": 78}')
"""


def test_the_error_of_a_worker_keeps_its_kind(hands: Hands) -> None:
    error = failure(hands, command=(sys.executable, "-c", FAIL))
    assert (type(error), str(error)) == (ConfigError, "wrong")


def test_one_that_cannot_be_started_leaves_its_place(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(SLOTS + 1):
        with pytest.raises(SystemRefusedError, match="cannot start a worker: No such file or directory"):
            hands.start()
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, "nothing stays open")
    assert len(hands.workers) == 0


# --- workers that do not behave


NONSENSE = {
    "no JSON": b"hello",
    "no event": b"{}",
    "no number": b'{"event": "failed", "message": "x", "exit_code": "y"}',
    "no list": b'{"event": "failed", "message": "x", "exit_code": []}',
    "half of it": b'{"event": "failed"}',
    "more than any number": b'{"event": "failed", "message": "x", "exit_code": Infinity}',
    "not a number": b'{"event": "failed", "message": "", "exit_code": NaN}',
    "too much": b'{"event": "failed", "message": "", "exit_code": 1e999}',
    "too deep": b"[" * 50_000,
}


SAY = """
import socket, sys, time
channel = socket.socket(fileno=0)
with open(sys.argv[1], "rb") as data:
    channel.send(data.read())
time.sleep(600)
"""


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_one_that_talks_nonsense_is_killed(hands: Hands, data: bytes, tmp_path: Path) -> None:
    """Somebody may have taken it over; that must not be the end of all the others."""
    (tmp_path / "data").write_bytes(data)
    (worker,) = hands.start(command=(sys.executable, "-c", SAY, str(tmp_path / "data")))
    assert hands.ended(worker) == "signal 9"
    assert hands.logged("a worker talks nonsense") == [{"pid": worker.pid}]


def test_one_that_has_closed_its_channel_but_does_not_end_is_killed(hands: Hands) -> None:
    becoming = ("sh", "-c", "exec 0</dev/null; exec sleep 600")
    (worker,) = hands.start(command=becoming)
    assert hands.ended(worker) == "signal 9"


# --- where they run


ALL = os.sched_getaffinity(0)


HOMES = tuple(sorted(ALL))


def test_or_the_scheduler_decides(hands: Hands) -> None:
    (worker,) = hands.serving(1, cpus=())
    assert worker.cpu is None
    assert {frozenset(where) for where, _ in hands.threads(worker)} == {frozenset(ALL)}


@pytest.mark.skipif(len(ALL) < 2, reason="with one processor there is nowhere to go")
@pytest.mark.slow
def test_a_stream_runs_anywhere_and_its_threads_come_home(hands: Hands) -> None:
    (worker,) = hands.serving(1, cpus=HOMES[:1])
    cpu = {worker.cpu}
    client, server = hands.connect()
    flowing = threading.Event()
    flowing.set()
    sender = threading.Thread(target=lambda: [client.sendall(bytes(1 << 20)) for _ in iter(flowing.is_set, False)])
    sender.start()
    drain = threading.Thread(target=lambda: [None for _ in iter(lambda: server.recv(1 << 20), b"")])
    drain.start()
    wait_until(lambda: [where for where, _ in hands.threads(worker) if where != cpu] == [ALL], "it goes anywhere")
    flowing.clear()
    sender.join()
    wait_until(lambda: all(where == cpu for where, _ in hands.threads(worker)), "it rests at home")
    flowing.set()
    again = threading.Thread(target=lambda: [client.sendall(bytes(1 << 20)) for _ in iter(flowing.is_set, False)])
    again.start()
    wait_until(lambda: any(where != cpu for where, _ in hands.threads(worker)), "it goes again")
    flowing.clear()
    again.join()
    client.close()
    drain.join()
    server.close()
    wait_until(lambda: all(where == cpu for where, _ in hands.threads(worker)), "it has come home")


def test_threads_of_many_messages_wait_for_others_and_of_few_do_not(hands: Hands) -> None:
    (worker,) = hands.serving(1, cpus=HOMES[:1])
    client, server = hands.connect()

    def patient() -> int:
        return [how for _, how in hands.threads(worker)].count(os.SCHED_BATCH)

    def exchange() -> None:
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        server.sendall(b"x")
        assert client.recv(1) == b"x"

    for _ in range(ESTABLISHED - 2):
        exchange()
    assert patient() == 0
    for _ in range(3):
        exchange()
    wait_until(lambda: patient() == 2, "both of its pumps wait for others")
    client.close()
    server.close()
    wait_until(lambda: patient() == 0, "its threads are as before")


def test_no_thread_of_a_worker_is_interrupted(hands: Hands) -> None:
    """But by the signals of a crash, of which the log is told."""
    (worker,) = hands.serving(1)
    client, _ = hands.connect()
    crashes = {signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL}
    unblockable = {signal.SIGKILL, signal.SIGSTOP}
    masks = set()
    for status in Path(f"/proc/{worker.pid}/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):
            line = next(one for one in status.read_text("ascii").splitlines() if one.startswith("SigBlk:"))
            masks.add(int(line.split()[1], 16))
    (mask,) = masks
    assert {number for number in signal.valid_signals() if not mask >> (number - 1) & 1} == crashes | unblockable
    client.close()
