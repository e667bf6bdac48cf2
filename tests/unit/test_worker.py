"""The accept loop in a thread, stopped by `wakeup.notify`, which is what a signal handler calls."""

import errno
import logging
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import lines as lines_module
import loopback
import pytest
from deadlines import PATIENCE, wait_until
from lines import Lines, fields
from loopback import FIN, RST

from tproxy_relay import endpoint, orig_dst, sockets
from tproxy_relay import worker as worker_module
from tproxy_relay.connection import THREADS, Connection
from tproxy_relay.listeners import Listener
from tproxy_relay.policy import Destinations
from tproxy_relay.settings import Settings
from tproxy_relay.wakeup import Wakeup
from tproxy_relay.worker import Worker

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class FlakyListener:
    """A real listening socket whose accept() fails first, as often and with what it was told."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self.errors: list[int] = []
        self.calls = 0

    def accept(self) -> tuple[socket.socket, object]:
        """accept(2), or the next error."""
        self.calls += 1
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return self._real.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


class Running:
    """A Worker in a thread, an echo-less server as its target, and clients."""

    def __init__(
        self, *, max_connections: int = 10, start: bool = True, listeners: int = 1, **settings: object
    ) -> None:
        self._stack = ExitStack()
        self.server = self._stack.enter_context(loopback.listen(backlog=1024))
        self.lines: Lines = self._stack.enter_context(lines_module.collected())
        self.wakeup = Wakeup()
        self._stack.callback(self.wakeup.close)
        self.flaky: list[FlakyListener] = []
        made = [self._listener() for _ in range(listeners)]
        self.addresses = [one.endpoint for one in made]
        self.worker = Worker(
            Settings(**settings),  # type: ignore[arg-type]
            made,
            self.wakeup,
            tuning=loopback.UNTUNED,
            destinations=Destinations(
                frozenset(one.port for one in self.addresses), endpoint.from_sockaddr(self.server.getsockname())
            ),
            max_connections=max_connections,
        )
        self.stopping = threading.Event()
        self.latecomers_seconds = 0.0
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="worker")
        self.cpu_seconds = 0.0
        if start:
            self.thread.start()

    def _listener(self) -> Listener:
        raw = loopback.listen(backlog=1024)
        raw.setblocking(False)
        sockets.tune(raw, loopback.UNTUNED)
        listener = Listener(raw)
        self.flaky.append(FlakyListener(raw))
        listener.sock = self.flaky[-1]  # type: ignore[assignment]
        return listener

    def _run(self) -> None:
        try:
            self.worker.run(self._stopping)
        except BaseException as error:
            self.error = error

    def _stopping(self) -> float:
        self.stopping.set()
        return self.latecomers_seconds

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.thread.is_alive():
            self.wakeup.notify(signal.SIGINT)
            self.thread.join(PATIENCE)
        alive = self.thread.is_alive()
        self._stack.close()
        threading.stack_size(0)
        assert not alive, "the worker did not stop"

    def dial(self, number: int = 0, source: str = "") -> socket.socket:
        """A client; closed with the worker."""
        host, port = self.addresses[number][:2]
        return self._stack.enter_context(loopback.dial((host, port), source=source))

    def serve(self) -> socket.socket:
        """The server's end of the next connection."""
        return self._stack.enter_context(self.server.accept()[0])

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client and the server's end, relayed. One at a time, so that the two belong together."""
        client = self.dial()
        server = self.serve()
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        return client, server

    def signal(self, *numbers: signal.Signals) -> None:
        """As if these signals had come, all before the worker looks."""
        for number in numbers[:-1]:
            self.wakeup._signals.append(number)
        self.wakeup.notify(numbers[-1])

    def await_end(self, seconds: float = PATIENCE) -> None:
        """The worker has returned."""
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"the worker did not stop within {seconds} s"
        if self.error:
            raise self.error

    def totals(self) -> dict[str, object]:
        """The fields of the last line."""
        (stopped,) = self.lines.of("stopped")
        return fields(stopped)


@pytest.fixture
def running() -> Iterator[Running]:
    with Running() as started:
        yield started


# --- accepting


def test_it_relays_from_every_listener() -> None:
    with Running(listeners=3) as running:
        for count, number in enumerate((0, 1, 2, 1, 0), 1):
            client = running.dial(number)
            server = running.serve()
            client.sendall(b"hello")
            assert loopback.read_exactly(server, 5) == b"hello"
            server.close()
            client.close()
            running.lines.closed(count)
        listeners = [line["listener"] for line in running.lines.closed(5)]
        assert listeners == [str(running.addresses[number]) for number in (0, 1, 2, 1, 0)]


def test_connections_are_told_apart_by_their_ids(running: Running) -> None:
    for _ in range(5):
        client, server = running.connect()
        client.close()
        server.close()
    ids = {str(line["id"]) for line in running.lines.closed(5)}
    assert len(ids) == 5
    assert all(re.fullmatch(r"[0-9a-f]+-[0-9a-f]+-[0-9a-f]+", one) for one in ids)


def test_beyond_the_limit_clients_wait_in_the_backlog_and_are_served_afterwards() -> None:
    with Running(max_connections=3) as running:
        served = [running.connect() for _ in range(3)]
        waiting = [running.dial() for _ in range(4)]
        for client in waiting:
            client.sendall(b"me")
        wait_until(lambda: running.lines.of("not accepting"), "it says so")
        running.server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            running.server.accept()
        running.server.settimeout(PATIENCE)
        assert len(running.worker._registry) == 3
        for client, server in served:
            began = time.monotonic()
            client.close()
            server.close()
            upstream = running.serve()
            assert time.monotonic() - began < 1
            assert loopback.read_exactly(upstream, 2) == b"me"
        first, *_ = running.lines.of("not accepting")
        assert first.levelno == logging.WARNING
        assert fields(first) == {"reason": "max-connections", "live": 3}
        assert len(running.worker._registry) == 3
        waiting[2].close()
        upstream.close()
        upstream = running.serve()
        assert loopback.read_exactly(upstream, 2) == b"me", "the last that waited"
        assert not running.lines.of("accepting again"), "it is as full as before"
        waiting[3].close()
        upstream.close()
        wait_until(lambda: running.lines.of("accepting again"), "there is room and nobody waits")
        assert len(running.lines.of("not accepting")) == 1, "a line for each client that left"


def test_a_place_that_comes_free_is_given_away_at_once() -> None:
    """By the wake-up of the connection that ends, not only by the clock."""
    with Running(max_connections=1) as running:
        waits = []
        client, server = running.connect()
        for _ in range(8):
            following = running.dial()
            wait_until(lambda: running.worker._full, "it is full")
            began = time.monotonic()
            client.close()
            server.close()
            client, server = following, running.serve()
            waits.append(time.monotonic() - began)
        assert sorted(waits)[len(waits) // 2] < 0.05


@pytest.mark.parametrize("draining", [False, True])
def test_a_full_worker_sleeps(draining: bool) -> None:
    with Running(max_connections=2, drain_timeout=20.0) as running:
        served = [running.connect() for _ in range(2)]
        waiting = running.dial()
        wait_until(lambda: running.worker._full, "it is full")
        if draining:
            running.signal(signal.SIGTERM)
            wait_until(lambda: running.lines.of("draining"), "it drains")
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(0.6)  # the length of the measurement
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used < 0.2, "it spins"
        for client, server in served:
            client.close()
            server.close()
        waiting.close()


def is_refused(running: Running) -> bool:
    """Whether a new client is reset: at its first read, or so quickly that connect() itself says so."""
    try:
        return loopback.read_to_end(running.dial()) == (b"", RST)
    except ConnectionResetError:
        return True


def test_one_source_gets_so_many_and_others_are_still_served() -> None:
    with Running(max_per_source=2) as running:
        running.connect()
        client, server = running.connect()
        assert is_refused(running)
        (line,) = running.lines.closed()
        assert line["outcome"] == "over-limit"
        assert "max-per-source" in str(line["error"])
        other = running.dial(source="127.0.0.2")
        other.sendall(b"hi")
        assert loopback.read_exactly(running.serve(), 2) == b"hi"
        client.close()
        server.close()
        running.lines.closed(2)
        running.connect()


def test_without_threads_clients_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(max_connections=50) as running:
        refuse = [True]
        start = threading.Thread.start

        def maybe_start(thread: threading.Thread) -> None:
            if refuse and thread.name.startswith("relay"):
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", maybe_start)
        served = [running.connect() for _ in range(16)]  # the spare threads
        waiting = running.dial()
        waiting.sendall(b"me")
        wait_until(lambda: running.lines.of("not accepting"), "it says so")
        assert fields(running.lines.of("not accepting")[0])["reason"] == "no more threads"
        refuse.clear()
        assert loopback.read_exactly(running.serve(), 2) == b"me"
        assert len(served) == 16


# --- errors of accept()


@pytest.mark.parametrize("number", sorted(worker_module._ABOUT_THAT_CONNECTION))
def test_an_error_of_one_connection_is_passed_over(running: Running, number: int) -> None:
    running.flaky[0].errors[:] = [number] * 3
    running.connect()
    assert not running.flaky[0].errors
    assert not running.lines.of("not accepting")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_lack_of_capacity_is_waited_for_and_said_once(running: Running, number: int) -> None:
    running.flaky[0].errors[:] = [number] * 4
    began = time.monotonic()
    running.connect()
    assert 3 * worker_module.CAPACITY_PAUSE < time.monotonic() - began < 3
    assert running.flaky[0].calls < 12, "it spins"
    (line,) = running.lines.of("not accepting")
    assert fields(line)["reason"] == os.strerror(number)
    wait_until(lambda: running.lines.of("accepting again"), "it says so")
    assert len(running.lines.of("accepting again")) == 1


@pytest.mark.parametrize("number", [errno.EBADF, errno.EINVAL, errno.ENOTSOCK])
def test_an_error_of_our_own_ends_the_worker(running: Running, number: int) -> None:
    running.flaky[0].errors[:] = [number]
    with suppress(ConnectionResetError):  # the worker may be quicker
        running.dial()
    with pytest.raises(OSError) as caught:
        running.await_end()
    assert caught.value.errno == number
    assert not running.stopping.is_set()


# --- TERM


def test_term_drains(running: Running) -> None:
    client, server = running.connect()
    running.signal(signal.SIGTERM)
    wait_until(lambda: running.lines.of("draining"), "it drains")
    assert running.stopping.is_set()
    host, port = running.addresses[0][:2]
    with pytest.raises(ConnectionRefusedError):
        loopback.dial((host, port))
    client.sendall(b"still served")
    assert loopback.read_exactly(server, 12) == b"still served"
    server.close()
    assert loopback.read_to_end(client) == (b"", FIN)
    client.close()
    running.await_end(1)
    assert running.lines.outcomes() == ["completed"]
    assert running.totals() == {"accepted": 1, "live": 0, "closed": {"completed": 1}}


def test_term_without_connections_ends_at_once(running: Running) -> None:
    running.signal(signal.SIGTERM)
    running.await_end(1)
    assert running.totals() == {"accepted": 0, "live": 0, "closed": {}}


@pytest.mark.parametrize("count", [1, 2 * worker_module.ACCEPT_BATCH + 40])
def test_what_waits_in_the_backlog_is_served_when_term_comes(count: int) -> None:
    with Running(start=False, max_connections=count) as running:
        clients = [running.dial() for _ in range(count)]
        running.signal(signal.SIGTERM)
        running.thread.start()
        for client in clients:
            client.sendall(b"me")
        for _ in clients:
            with running.server.accept()[0] as server:
                assert loopback.read_exactly(server, 2) == b"me"
        for client in clients:
            client.close()
        running.await_end()
        assert running.lines.outcomes(count) == ["completed"] * count


def test_clients_whose_handshake_was_under_way_are_served_when_the_stop_has_begun(running: Running) -> None:
    running.latecomers_seconds = 2 * PATIENCE
    running.signal(signal.SIGTERM)
    assert running.stopping.wait(PATIENCE)
    client, server = running.connect()
    assert not running.lines.of("draining")
    client.close()
    server.close()
    wait_until(lambda: running.lines.outcomes() == ["completed"], "it is served to its end")
    running.signal(signal.SIGTERM)
    running.await_end(1)


def test_waiting_for_latecomers_ends_by_itself() -> None:
    with Running() as running:
        running.latecomers_seconds = 0.3
        began = time.monotonic()
        running.signal(signal.SIGTERM)
        running.await_end(2)
        assert 0.3 <= time.monotonic() - began < 1


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_wait_for_latecomers(running: Running, second: signal.Signals) -> None:
    running.latecomers_seconds = 2 * PATIENCE
    running.connect()
    running.signal(signal.SIGTERM)
    assert running.stopping.wait(PATIENCE)
    running.signal(second)
    running.await_end(2)
    assert running.lines.outcomes() == ["aborted"]


def test_the_drain_ends_with_its_deadline() -> None:
    with Running(drain_timeout=0.4) as running:
        client, server = running.connect()
        began = time.monotonic()
        running.signal(signal.SIGTERM)
        running.await_end(3)
        assert 0.35 < time.monotonic() - began < 2
        assert running.lines.outcomes() == ["drained"]
        assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST
        assert running.totals()["closed"] == {"drained": 1}


def test_a_drain_timeout_of_nothing_waits_for_nothing() -> None:
    with Running(drain_timeout=0.0) as running:
        running.connect()
        running.signal(signal.SIGTERM)
        running.await_end(1)
        assert running.lines.outcomes() == ["drained"]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_drain(running: Running, second: signal.Signals) -> None:
    client, server = running.connect()
    running.signal(signal.SIGTERM)
    wait_until(lambda: running.lines.of("draining"), "it drains")
    running.signal(second)
    running.await_end(2)
    assert running.lines.outcomes() == ["aborted"]
    assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST


@pytest.mark.parametrize(
    "signals",
    [
        (signal.SIGINT,),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM),
    ],
)
def test_int_and_two_signals_at_once_do_not_drain(running: Running, signals: tuple[signal.Signals, ...]) -> None:
    running.connect()
    running.signal(*signals)
    running.await_end(2)
    assert running.lines.outcomes() == ["aborted"]


def test_other_signals_do_not_end_a_drain(running: Running) -> None:
    client, server = running.connect()
    running.signal(signal.SIGTERM)
    wait_until(lambda: running.lines.of("draining"), "it drains")
    running.signal(signal.SIGHUP, signal.SIGUSR1)
    wait_until(lambda: running.lines.of("connections"), "it obeys USR1")
    client.send(b"x")
    assert server.recv(1) == b"x"
    server.close()
    client.close()
    running.await_end(1)
    assert running.lines.outcomes() == ["completed"]


def test_a_connection_that_is_connecting_is_ended_too() -> None:
    with loopback.full_backlog() as address, Running(connect_timeout=30.0) as running:
        destinations = Destinations(frozenset(), endpoint.from_sockaddr(address))
        object.__setattr__(running.worker._context, "destinations", destinations)
        client = running.dial()
        wait_until(lambda: connecting(running.worker._registry.live()), "it connects")
        running.signal(signal.SIGINT)
        running.await_end(2)
        assert running.lines.outcomes() == ["aborted"]
        assert loopback.read_to_end(client)[1] == RST


def connecting(live: list[Connection]) -> bool:
    """True while the first of them waits for the answer to its SYN."""
    return bool(live) and live[0]._upstream is not None


def test_a_connection_whose_send_is_stuck_is_ended_in_time(running: Running) -> None:
    client, _server = running.connect()
    loopback.fill(client)
    began = time.monotonic()
    running.signal(signal.SIGINT)
    running.await_end(3)
    assert time.monotonic() - began < worker_module.ABORT_GRACE + 0.3
    assert running.lines.outcomes() == ["aborted"]


def test_a_connection_whose_thread_never_returns_is_recorded_all_the_same(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "ABORT_GRACE", 0.3)
    go = threading.Event()

    def hang(*_args: object) -> None:
        go.wait(20)

    monkeypatch.setattr(orig_dst, "original_destination", hang)
    running.dial()
    wait_until(lambda: len(running.worker._registry), "it is accepted")
    (stuck,) = running.worker._registry.live()
    running.signal(signal.SIGINT)
    running.await_end(2)
    (line,) = running.lines.closed()
    assert (line["outcome"], line["error"]) == ("aborted", "its threads did not end in time")
    assert running.totals() == {"accepted": 1, "live": 0, "closed": {"aborted": 1}}
    go.set()
    wait_until(lambda: stuck.destination, "it goes on")
    running.worker._threads.release(THREADS)
    wait_until(lambda: not any(one.name.startswith("relay") for one in threading.enumerate()), "its thread ends")
    stuck._client.sock.close()  # what the end of the process does


# --- HUP, USR1, the clock


def test_usr1_shows_what_is_live(running: Running) -> None:
    client, server = running.connect()
    client.send(b"abc")
    server.recv(3)
    wait_until(lambda: running.worker._registry.live()[0].snapshot()["bytes_up"] == 3, "it is counted")
    done, other = running.connect()
    done.close()
    other.close()
    running.lines.closed()
    running.signal(signal.SIGUSR1)
    wait_until(lambda: running.lines.of("connections"), "the totals are said")
    (live,) = running.lines.of("connection live")
    assert fields(live)["client"] == str(endpoint.from_sockaddr(client.getsockname()))
    assert (fields(live)["state"], fields(live)["bytes_up"]) == ("open", 3)
    (totals,) = running.lines.of("connections")
    assert fields(totals) == {"accepted": 2, "live": 1, "closed": {"completed": 1}}


def test_hup_changes_nothing_and_says_so(running: Running) -> None:
    running.connect()
    running.signal(signal.SIGHUP)
    wait_until(lambda: running.lines.of("settings are read at start only: restart to change them"), "it says so")
    running.connect()


def test_idle_connections_are_reset_and_busy_ones_are_not() -> None:
    with Running(idle_timeout=0.4) as running:
        idle, idle_server = running.connect()
        busy, busy_server = running.connect()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            busy.send(b"x")
            busy_server.recv(1)
            time.sleep(0.02)
        assert running.lines.outcomes() == ["idle"]
        assert loopback.read_to_end(idle)[1] == loopback.read_to_end(idle_server)[1] == RST
        (line,) = running.lines.closed()
        assert 0.4 <= float(str(line["seconds"])) < 0.9


def test_half_closed_connections_have_their_own_timeout() -> None:
    with Running(half_close_timeout=0.3) as running:
        open_client, _open_server = running.connect()
        client, server = running.connect()
        client.shutdown(socket.SHUT_WR)
        assert loopback.read_to_end(server) == (b"", FIN)
        assert running.lines.outcomes() == ["half-close-timeout"]
        assert loopback.read_to_end(client)[1] == RST
        open_client.send(b"x")
        wait_until(lambda: len(running.worker._registry) == 1, "the other one is left")


def test_idle_connections_are_reset_while_draining_too() -> None:
    with Running(idle_timeout=0.3, drain_timeout=20.0) as running:
        running.connect()
        running.signal(signal.SIGTERM)
        running.await_end(3)
        assert running.lines.outcomes() == ["idle"]


def test_a_reset_that_nobody_reads_is_noticed(running: Running) -> None:
    client, server = running.connect()
    server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(client) == (b"", FIN)
    loopback.reset(server)
    assert running.lines.outcomes() == ["upstream-reset"]
    wait_until(lambda: loopback.is_reset(client), "the client is reset")


def test_a_reset_that_nobody_reads_is_noticed_while_draining(running: Running) -> None:
    client, server = running.connect()
    server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(client) == (b"", FIN)
    running.signal(signal.SIGTERM)
    wait_until(lambda: running.lines.of("draining"), "it drains")
    loopback.reset(server)
    running.await_end(2)
    assert running.lines.outcomes() == ["upstream-reset"]


def test_threads_that_nobody_needs_any_more_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "TRIM_INTERVAL", 0.1)

    def pool() -> int:
        return sum(thread.name.startswith("relay") for thread in threading.enumerate())

    with Running(max_connections=60) as running:
        at_rest = pool()
        peers = [running.connect() for _ in range(40)]
        assert pool() >= 80
        for client, server in peers:
            client.close()
            server.close()
        running.lines.closed(40)
        wait_until(lambda: pool() <= at_rest + 2, "the pool shrinks", 2)
        wait_until(lambda: not running.worker._trim_at, "and the clock stops", 2)
        running.connect()


def test_accepted_is_closed_plus_live(running: Running) -> None:
    for number in range(20):
        client, server = running.connect()
        if number % 3 == 0:
            loopback.reset(client)
        elif number % 3 == 1:
            client.close()
            server.close()
        else:
            loopback.reset(server)
        running.lines.closed(number + 1)
    running.connect()
    totals = running.worker._totals()
    assert totals == {
        "accepted": 21,
        "live": 1,
        "closed": {"client-reset": 7, "completed": 7, "upstream-reset": 6},
    }


def test_a_full_worker_with_several_listeners_serves_everybody_in_the_end() -> None:
    """A place that comes free while another listener has nobody waiting must not end the watch over all of them."""
    with Running(max_connections=8, listeners=4) as running:
        first = [running.connect() for _ in range(8)]
        waiting = [running.dial(0) for _ in range(100)]
        for client in waiting:
            client.sendall(b"me")
            client.shutdown(socket.SHUT_WR)
        for client, server in first:
            client.close()
            server.close()
        for number, client in enumerate(waiting):
            with running.server.accept()[0] as upstream:
                assert loopback.read_exactly(upstream, 2) == b"me", f"after {number} of them"
        for client in waiting:
            assert loopback.read_to_end(client)[1] == FIN
