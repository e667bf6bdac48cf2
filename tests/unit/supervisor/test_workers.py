"""Real workers, started as the supervisor starts them: what becomes of them, and what is counted of them."""

import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import children
import lines as lines_module
import loopback
import pytest
from deadlines import PATIENCE, wait_until
from hypothesis import given
from hypothesis import strategies as st
from lines import fields
from loopback import FIN, RST

from tproxy_relay.errors import ConfigError, RelayError, SystemRefusedError
from tproxy_relay.ipc import scoreboard as board_module
from tproxy_relay.ipc.channel import Message
from tproxy_relay.ipc.scoreboard import SLOTS, WATCHING, Numbers, Scoreboard
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.net import listeners
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.read_buffer import ESTABLISHED
from tproxy_relay.settings import HostPort, Settings
from tproxy_relay.supervisor import worker_process
from tproxy_relay.supervisor import workers as workers
from tproxy_relay.supervisor.generation import prepare
from tproxy_relay.supervisor.worker_process import WorkerProcess
from tproxy_relay.supervisor.workers import DEATHS_PERIOD, MAX_DEATHS, Deaths, Generation, Workers, added, with_lost
from tproxy_relay.worker.messages import Failed


class Log:
    """In the place of the LogWriter."""

    def __init__(self) -> None:
        self.text = b""

    def pass_on(self, lines: bytes) -> None:
        """As LogWriter's."""
        self.text += lines

    @property
    def lines(self) -> list[Message]:
        """What the workers have logged."""
        return [json.loads(line) for line in self.text.splitlines()]


class Hands:
    """Workers, and the little of a supervisor that it takes to have some workers in it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.said = self._stack.enter_context(lines_module.collected())
        self.server = self._stack.enter_context(loopback.listen())
        target = HostPort(*self.server.getsockname())
        settings = Settings(bind=("127.0.0.1",), ports=(0,), mode="redirect", log_format="json", target=target)
        self.generation = Generation(1, prepare(replace(settings, max_connections=50), [], inherited=False))
        self._stack.callback(listeners.close_all, list(self.generation.prepared.listeners))
        self.address = self.generation.prepared.listeners[0].endpoint
        self.selector = self._stack.enter_context(selectors.DefaultSelector())
        self.scoreboard = Scoreboard.create(50)
        self._stack.callback(self.scoreboard.close)
        self.log = Log()
        self.pipes = LogPipes(self.log)  # type: ignore[arg-type]
        self.workers = Workers(self.selector, self.scoreboard, self.pipes)
        self.how: dict[int, str] = {}

    def close(self) -> None:
        """Whatever is left."""
        self.workers.dismiss(self.workers)
        self.turn_until(lambda: not len(self.workers), "all are gone")
        self.pipes.close(PATIENCE)
        self._stack.close()

    def turn_until(self, happened: Callable[[], object], what: str) -> None:
        """Hear the workers until then."""

        def turn() -> object:
            for key, _ in self.selector.select(0.001):
                worker: WorkerProcess = key.data
                if not worker.hear():
                    self.how[worker.pid] = self.workers.reap(worker)
            return happened()

        wait_until(turn, what, 4 * PATIENCE)

    def start(self, count: int = 1, **prepared: Any) -> list[WorkerProcess]:
        """Some more workers."""
        changed = replace(self.generation.prepared, **prepared)
        generation = self.generation._replace(prepared=changed)
        before = set(self.workers)
        for _ in range(count):
            self.workers.start(generation)
        return [worker for worker in self.workers if worker not in before]

    def serving(self, count: int = 1, **prepared: Any) -> list[WorkerProcess]:
        """Some more that take clients."""
        workers = self.start(count, **prepared)
        self.turn_until(lambda: all(worker.ready for worker in workers), "they are ready")
        for worker in workers:
            worker.serve()
        wait_until(lambda: self.scoreboard.column(board_module._STATE).count(WATCHING) >= count, "they serve")
        return workers

    def ended(self, worker: WorkerProcess) -> str:
        """How it has."""
        self.turn_until(lambda: worker.pid in self.how, "it has ended")
        return self.how[worker.pid]

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client and the server's end, relayed."""
        client = self._stack.enter_context(loopback.dial(self.address[:2]))
        server = self._stack.enter_context(self.server.accept()[0])
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        return client, server

    def threads(self, worker: WorkerProcess) -> list[tuple[set[int], int]]:
        """Where each of its threads may run, and the policy that it runs under."""
        found = []
        for name in os.listdir(f"/proc/{worker.pid}/task"):
            with suppress(ProcessLookupError):  # spare ones end
                found.append((os.sched_getaffinity(int(name)), os.sched_getscheduler(int(name))))
        return found

    def age(self, worker: WorkerProcess, seconds: float) -> None:
        """Its last sign of life was so much longer ago; if the host was not up yet then, as long ago as that."""
        beat = worker.slot * board_module._WORDS + board_module._BEAT
        self.scoreboard._slots[beat] = max(1, self.scoreboard._slots[beat] - int(seconds * 10**9))

    def logged(self, message: str) -> list[Message]:
        """Our own lines with this message."""
        return [fields(record) for record in self.said.of(message)]


@pytest.fixture
def hands() -> Iterator[Hands]:
    made = Hands()
    try:
        yield made
    finally:
        made.close()


# --- a life


def test_a_life(hands: Hands) -> None:
    (worker,) = hands.start()
    assert hands.logged("worker started") == [{"pid": worker.pid, "generation": 1}]
    assert hands.workers.of(hands.generation) == [worker]
    assert hands.workers.of(hands.generation._replace(number=2)) == []
    waiting = loopback.dial(hands.address[:2])  # in the backlog, before anybody serves
    hands.turn_until(lambda: worker.ready, "it is ready")
    assert (worker.serving, worker.numbers.accepted) == (False, 0), "not before it is told to"
    worker.serve()
    served, _ = hands.server.accept()
    client, server = hands.connect()
    assert worker.numbers == hands.workers.numbers == Numbers(2, 2, {})
    worker.show_live()
    wait_until(lambda: b"connection live" in hands.log.text, "it shows its connections")
    live = [line for line in hands.log.lines if line["message"] == "connection live"]
    assert {int(line["id"].split("-")[0], 16) for line in live} == {worker.pid}
    worker.leave(None, 0.0, None)
    assert worker.leaving
    client.sendall(b"still")
    assert loopback.read_exactly(server, 5) == b"still"
    for sock in (waiting, served, server):
        sock.close()
    assert loopback.read_to_end(client) == (b"", FIN)
    client.close()
    assert hands.ended(worker) == "exit 0"
    assert (len(hands.workers), hands.workers.deaths) == (0, 0)
    assert hands.workers.numbers.accepted == sum(hands.workers.numbers.closed.values()) == 2
    (record,) = hands.said.of("worker ended")
    assert fields(record) == {"pid": worker.pid, "how": "exit 0", "live": 0}
    assert record.levelname == "DEBUG"


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
    listener = hands.generation.prepared.listeners[0].sock
    assert os.fstat(listener.fileno()).st_ino == os.stat(f"/proc/{worker.pid}/fd/3").st_ino


def test_the_service_manager_is_the_supervisors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "KEPT"):
        monkeypatch.setenv(name, "x")
    environ = worker_process.environment()
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
    hands.turn_until(lambda: worker.ready, "it is ready")
    worker.stop()
    assert hands.ended(worker) == "exit 0"


def test_it_is_killed(hands: Hands) -> None:
    worker, other = hands.serving(2)
    peers = [hands.connect() for _ in range(4)]
    lost, kept = worker.numbers.live, other.numbers.live
    assert lost and kept and lost + kept == 4
    os.kill(worker.pid, signal.SIGKILL)
    assert hands.ended(worker) == "signal 9"
    (record,) = hands.said.of("worker ended")
    assert fields(record) == {"pid": worker.pid, "how": "signal 9", "live": lost}
    assert record.levelname == "ERROR"
    assert hands.workers.numbers == Numbers(4, kept, {"aborted": lost}), "nothing is forgotten"
    wait_until(lambda: sum(loopback.is_reset(client) for client, _ in peers) == lost, "its connections are reset")
    assert hands.workers.of(hands.generation) == [other]
    (again,) = hands.start()
    assert (again.slot, again.numbers) == (worker.slot, Numbers(0, 0, {}))


def test_one_that_crashes_says_why(hands: Hands) -> None:
    (worker,) = hands.serving()
    os.kill(worker.pid, signal.SIGSEGV)
    assert hands.ended(worker) == "signal 11"
    wait_until(lambda: hands.logged("a worker has said"), "its last words")
    said = hands.logged("a worker has said")
    assert {one["pid"] for one in said} == {worker.pid}
    assert "Segmentation fault" in str(said[0]["text"])


def test_those_that_are_not_needed_any_more(hands: Hands) -> None:
    workers = hands.start(2)
    hands.workers.dismiss(workers)
    assert [hands.ended(worker) for worker in workers] == ["signal 9"] * 2
    assert {record.levelname for record in hands.said.of("worker ended")} == {"DEBUG"}


# --- workers that cannot boot


def failure(hands: Hands, **prepared: Any) -> RelayError:
    """Of a worker that is started with this."""
    (worker,) = hands.start(**prepared)
    how = hands.ended(worker)
    assert not worker.ready
    return worker.why_it_failed(how)


def test_one_that_finds_something_wrong(hands: Hands) -> None:
    order = hands.generation.prepared.spec
    wrong = replace(order, settings=replace(order.settings, mode="tproxy"))
    error = failure(hands, spec=wrong)
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


def test_the_error_of_a_worker_keeps_its_kind(hands: Hands) -> None:
    (worker,) = hands.start()
    worker._take(Failed("wrong", 78))
    assert type(worker.why_it_failed("exit 78")) is ConfigError


def test_too_many(hands: Hands) -> None:
    for _ in range(SLOTS):
        hands.scoreboard.claim()
    with pytest.raises(SystemRefusedError, match="too many workers still finish their connections"):
        hands.start()
    hands.scoreboard.clear(5)
    (worker,) = hands.start()
    assert worker.slot == 5


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


# --- workers that stand still


def test_a_stalled_one_is_killed(hands: Hands) -> None:
    order = hands.generation.prepared.spec
    often = replace(order, settings=replace(order.settings, stall_timeout=0.4))  # ten signs of life a second
    worker, other = hands.serving(2, spec=often)
    worker.stall_timeout = other.stall_timeout = 1
    os.kill(worker.pid, signal.SIGSTOP)
    wait_until(lambda: worker.silence > 1, "it is silent")
    for _ in range(3):
        hands.workers.kill_stalled()
    assert hands.ended(worker) == "signal 9"
    (line,) = hands.logged("worker stalled")
    assert line["pid"] == worker.pid
    assert isinstance(line["seconds"], float) and 1 <= line["seconds"] < 2
    assert list(hands.workers) == [other]


def test_0_means_never(hands: Hands) -> None:
    (worker,) = hands.serving()
    worker.stall_timeout = 0
    hands.age(worker, 3_600)
    for _ in range(3):
        hands.workers.kill_stalled()
    assert hands.logged("worker stalled") == []


def test_one_look_is_not_enough(hands: Hands) -> None:
    """It may have been stopped together with the supervisor, which was the first to go on."""
    (worker,) = hands.serving()
    hands.age(worker, worker.stall_timeout + 1)
    hands.workers.kill_stalled()
    wait_until(lambda: worker.silence < worker.stall_timeout, "it has gone on")
    for _ in range(3):
        hands.workers.kill_stalled()
    assert hands.logged("worker stalled") == []


def test_one_that_does_not_get_ready_is_killed(hands: Hands) -> None:
    (worker,) = hands.start(command=("sleep", "600"))
    worker.stall_timeout = 0.001
    for _ in range(2):
        hands.workers.kill_stalled()
    assert hands.logged("worker stalled") == [], "it may take its time"
    worker.stall_timeout = 0
    hands.age(worker, workers.BOOT_TIMEOUT + 1)
    for _ in range(2):
        hands.workers.kill_stalled()
    assert hands.ended(worker) == "signal 9"
    assert hands.logged("worker stalled")[0]["pid"] == worker.pid


def test_when_everything_stood_still_nobody_is_to_blame(hands: Hands) -> None:
    """A machine that was suspended, a debugger, Ctrl-Z: the look comes late."""
    (worker,) = hands.serving()
    os.kill(worker.pid, signal.SIGSTOP)
    hands.age(worker, 3_600)
    hands.workers._looked_at -= workers.LATE + 0.1
    for _ in range(3):
        hands.workers.kill_stalled()
    assert hands.logged("worker stalled") == []
    hands.workers._forgiving_until = time.monotonic()
    for _ in range(2):
        hands.workers.kill_stalled()
    assert hands.ended(worker) == "signal 9"


# --- deaths


def test_pauses() -> None:
    deaths = Deaths()
    assert [deaths.pause(float(now)) for now in range(5)] == [0.0, 0.1, 0.2, 0.4, None]


def test_deaths_that_are_long_ago_do_not_count() -> None:
    deaths = Deaths()
    assert [deaths.pause(now * 20.0) for now in range(100)] == [0.0, 0.1, 0.2] + [0.4] * 97
    assert deaths.pause(100 * 20.0 + DEATHS_PERIOD) == 0.0


@given(st.lists(st.floats(0, 40), max_size=30))
def test_five_within_a_minute_are_too_many(waits: list[float]) -> None:
    deaths, now, times = Deaths(), 0.0, list[float]()
    for wait in waits:
        now += wait
        times.append(now)
        recent = sum(now - death <= DEATHS_PERIOD for death in times)
        pause = deaths.pause(now)
        assert (pause is None) == (recent >= MAX_DEATHS)
        assert pause is None or 0 <= pause < 1


# --- numbers

some_numbers = st.builds(
    Numbers,
    st.integers(0, 9),
    st.integers(0, 9),
    st.dictionaries(st.sampled_from([outcome.value for outcome in Outcome]), st.integers(1, 9)),
)


@given(st.lists(some_numbers, max_size=5))
def test_numbers_are_added(several: list[Numbers]) -> None:
    total = added(several)
    assert total.accepted == sum(one.accepted for one in several)
    assert total.live == sum(one.live for one in several)
    for outcome in Outcome:
        assert total.closed.get(outcome.value, 0) == sum(one.closed.get(outcome.value, 0) for one in several)
    json.dumps(total._asdict())


@given(some_numbers)
def test_what_a_dead_worker_had_is_closed(numbers: Numbers) -> None:
    lost = with_lost(numbers)
    assert (lost.accepted, lost.live) == (numbers.accepted, 0)
    assert sum(lost.closed.values()) == sum(numbers.closed.values()) + numbers.live
    assert lost.closed.get("aborted", 0) == numbers.closed.get("aborted", 0) + numbers.live
    assert 0 not in lost.closed.values()


# --- where they run

ALL = os.sched_getaffinity(0)
HOMES = tuple(sorted(ALL))


def test_each_processor_has_as_many_as_the_others(hands: Hands) -> None:
    workers = hands.start(2 * len(HOMES), cpus=HOMES)
    assert sorted(str(worker.cpu) for worker in workers) == sorted([*map(str, HOMES)] * 2)
    hands.turn_until(lambda: all(worker.ready for worker in workers), "they are ready")
    for worker in workers:
        assert {(frozenset(where), how) for where, how in hands.threads(worker)} == {
            (frozenset({worker.cpu}), os.SCHED_OTHER)
        }
    dead = workers[len(HOMES) // 2]
    dead.kill()
    hands.ended(dead)
    (another,) = hands.start(1, cpus=HOMES)
    assert another.cpu == dead.cpu


def test_or_the_scheduler_decides(hands: Hands) -> None:
    (worker,) = hands.serving(1, cpus=())
    assert worker.cpu is None
    assert {frozenset(where) for where, _ in hands.threads(worker)} == {frozenset(ALL)}


@pytest.mark.skipif(len(ALL) < 2, reason="with one processor there is nowhere to go")
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
