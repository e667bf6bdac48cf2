"""Which clients are let in, and by which worker: one worker in a thread, and some processes beside each other."""

import errno
import logging
import math
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from lines import fields
from loopback import FIN, RST
from workers import Running, Several

from tproxy_relay.ipc import scoreboard
from tproxy_relay.relay.connection import THREADS
from tproxy_relay.worker import acceptor, eviction

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def running() -> Iterator[Running]:
    with Running() as started:
        yield started


# --- when it is full


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


def test_when_full_refuse_resets_whoever_there_is_no_room_for() -> None:
    with Running(max_connections=2, when_full="refuse") as running:
        served = [running.connect() for _ in range(2)]
        for number in range(1, 6):
            assert is_reset(running)
            line = running.lines.closed(number)[-1]
            assert (line["outcome"], line["error"]) == ("over-limit", "no room: max-connections (when-full)")
        assert not running.full and not running.lines.of("not accepting")
        for end in served[0]:
            end.close()
        running.lines.closed(6)
        running.connect()
        assert running.slot.numbers.live == 2


def test_when_full_refuse_holds_for_threads_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with Running(start=False, when_full="refuse") as running:
        threads, reserve, pairs = running.worker._threads, running.worker._threads.reserve, [THREADS]
        monkeypatch.setattr(threads, "reserve", lambda count: bool(pairs) and reserve(pairs.pop()))
        running.thread.start()
        running.connect()  # it takes the only pair
        assert is_reset(running)
        assert running.lines.closed(1)[0]["error"] == "no room: no more threads (when-full)"
        monkeypatch.undo()
        running.connect()


def is_reset(running: Running) -> bool:
    try:
        return loopback.read_to_end(running.dial()) == (b"", RST)
    except ConnectionResetError:
        return True


def test_when_full_evict_resets_the_one_that_has_rested_longest() -> None:
    with Running(max_connections=3, when_full="evict") as running:
        served = [running.connect() for _ in range(3)]
        idlest = served[1]
        for client, server in (served[0], served[2]):
            client.sendall(b"busy")
            assert loopback.read_exactly(server, 4) == b"busy"
        fresh, _ = running.connect()  # it waits until somebody has rested for long enough
        assert loopback.read_to_end(idlest[0]) == loopback.read_to_end(idlest[1]) == (b"", RST)
        (line,) = running.lines.closed()
        assert line["outcome"] == "evicted"
        assert float(str(line["seconds"])) >= eviction.REST
        for client, server in (served[0], served[2]):
            client.sendall(b"still")
            assert loopback.read_exactly(server, 5) == b"still"
        fresh.close()


def test_when_full_evict_leaves_busy_connections_alone() -> None:
    with Running(max_connections=2, when_full="evict") as running:
        served = [running.connect() for _ in range(2)]
        waiting = running.dial()
        waiting.sendall(b"me")
        until = time.monotonic() + 2 * eviction.REST
        while time.monotonic() < until:
            for client, server in served:
                client.sendall(b"busy")
                assert loopback.read_exactly(server, 4) == b"busy"
        assert not running.lines.of("connection closed")
        assert loopback.read_exactly(running.serve(), 2) == b"me", "now they rest"
        assert [line["outcome"] for line in running.lines.closed()] == ["evicted"]


def test_nobody_is_evicted_for_nobody() -> None:
    with Running(max_connections=2, when_full="evict") as running:
        served = [running.connect() for _ in range(2)]
        for client, _ in served:
            client.settimeout(2 * eviction.REST)
            with pytest.raises(TimeoutError):
                client.recv(1)
        assert not running.lines.of("connection closed")


def test_a_place_that_comes_free_is_given_away_at_once() -> None:
    """By the wake-up of the connection that ends, not only by the clock."""
    with Running(max_connections=1) as running:
        waits = []
        client, server = running.connect()
        for _ in range(8):
            following = running.dial()
            wait_until(lambda: running.full, "it is full")
            began = time.monotonic()
            client.close()
            server.close()
            client, server = following, running.serve()
            waits.append(time.monotonic() - began)
        assert sorted(waits)[len(waits) // 2] < 0.05


@pytest.mark.parametrize("draining", [False, True])
def test_a_full_worker_sleeps(draining: bool) -> None:
    with Running(max_connections=2) as running:
        served = [running.connect() for _ in range(2)]
        waiting = running.dial()
        wait_until(lambda: running.full, "it is full")
        if draining:
            running.leave(timeout=20.0)
            wait_until(lambda: running.left, "it leaves")
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(0.6)  # the length of the measurement
        after = resource.getrusage(resource.RUSAGE_SELF)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert used < 0.2, "it spins"
        for client, server in served:
            client.close()
            server.close()
        waiting.close()


def test_a_full_worker_with_several_listeners_serves_everybody_in_the_end() -> None:
    """Room that comes free while another listener has nobody waiting must not end the watch over all of them."""
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


@pytest.mark.parametrize("number", sorted(acceptor._ABOUT_THAT_CONNECTION))
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
    assert 3 * acceptor.CAPACITY_PAUSE < time.monotonic() - began < 3
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
    assert not running.leaving


# --- the end


@pytest.mark.parametrize("count", [1, 2 * acceptor.ACCEPT_BATCH + 40])
def test_what_waits_in_the_backlog_is_served_when_the_worker_leaves(count: int) -> None:
    with Running(start=False, max_connections=count) as running:
        clients = [running.dial() for _ in range(count)]
        running.leave()
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


# --- beside other workers

SERVED_BY_A_WAKE_UP = 0.05
"""Seconds. Half of the time after which a worker that was not woken looks by itself."""


def median(seconds: list[float]) -> float:
    """The middle one, for a busy machine makes some slow."""
    return sorted(seconds)[len(seconds) // 2]


def test_a_worker_without_descriptors_says_so_and_leaves_clients_to_the_others() -> None:
    with Running(max_connections=100, room=8) as running:
        for _ in range(8):
            running.connect()
        wait_until(lambda: running.full, "it has no room")
        (line,) = running.lines.of("not accepting")
        assert fields(line) == {"reason": "descriptors", "live": 8}
        assert running.slot.state == scoreboard.WAITING


def settled(several: Several) -> bool:
    """True if no worker rests that has clearly fewer than the busiest: they have been rung for, and need their turn."""
    most = max(several.live)
    clearly_fewer = most - math.isqrt(most - 1)
    return not any(
        state == scoreboard.RESTING and live < clearly_fewer for state, live in zip(several.states, several.live)
    )


def test_workers_share_the_clients_evenly() -> None:
    with Several(3) as several:
        for count in range(1, 61):
            several.connect()
            assert sum(several.live) == count
            wait_until(lambda: settled(several), "those that have fewer look for clients")
        assert min(several.live) >= 10 and max(several.live) <= 30, several.live


def bring_to_rest(several: Several) -> None:
    """The first worker leaves new clients to the second one, as soon as it has seen that it has more."""
    several.hold(0, 16)
    several.workers[1].stand_still()  # it would be the one that is woken
    several.connect()
    wait_until(lambda: several.states[0] == scoreboard.RESTING, "it rests")
    several.workers[1].child.send_signal(signal.SIGCONT)
    assert several.states == [scoreboard.RESTING, scoreboard.WATCHING]


def test_a_worker_that_has_more_than_others_rests_and_the_next_clients_go_to_them_at_once() -> None:
    with Several() as several:
        bring_to_rest(several)
        before = several.live
        waits = []
        for _ in range(10):
            began = time.monotonic()
            several.connect()
            waits.append(time.monotonic() - began)
        assert several.live == [before[0], before[1] + 10]
        assert several.states == [scoreboard.RESTING, scoreboard.WATCHING]
        assert median(waits) < SERVED_BY_A_WAKE_UP


def test_a_worker_that_rested_takes_its_share_again_when_the_others_have_caught_up() -> None:
    with Several() as several:
        bring_to_rest(several)
        for _ in range(60):
            several.connect()
            wait_until(lambda: settled(several), "those that have fewer look for clients")
        assert abs(several.live[0] - several.live[1]) <= 12, several.live
        assert sum(several.live) == 77


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_rests_takes_over_when_the_others_can_take_nobody(how: signal.Signals) -> None:
    with Several() as several:
        bring_to_rest(several)
        several.workers[1].child.send_signal(how)
        before = several.live[0]
        waiting = [several.dial() for _ in range(10)]
        for client in waiting:
            client.sendall(b"me")
        began = time.monotonic()
        for _ in waiting:
            assert loopback.read_exactly(several.serve(), 2) == b"me"
        assert time.monotonic() - began < 1.5
        assert several.live[0] == before + 10


def test_a_worker_that_rests_sleeps() -> None:
    with Several() as several:
        bring_to_rest(several)

        status = Path(f"/proc/{several.workers[0].child.pid}/status")

        def switches() -> int:
            return int(status.read_text(encoding="ascii").split("voluntary_ctxt_switches:")[1].split()[0])

        before = switches()
        time.sleep(0.6)  # the length of the measurement
        assert switches() - before < 15


def test_when_the_others_have_gone_a_worker_that_rested_watches_again() -> None:
    with Several() as several:
        bring_to_rest(several)
        several.workers[1].leave()
        wait_until(lambda: several.states == [scoreboard.WATCHING, scoreboard.ABSENT], "the other one has left")
        before = several.live[0]
        several.connect()
        assert several.live[0] == before + 1


def test_all_workers_together_have_just_so_many() -> None:
    with Several(3, most=7) as several:
        clients = [several.dial() for _ in range(20)]
        for client in clients:
            client.sendall(b"me")
        served = [several.serve() for _ in range(7)]
        several.server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            several.server.accept()
        several.server.settimeout(PATIENCE)
        assert sum(several.live) == 7
        for _ in range(13):
            loopback.reset(served.pop(0))
            served.append(several.serve())
            assert sum(several.live) <= 7
        for server in served:
            assert loopback.read_exactly(server, 2) == b"me"
        warned = [line for worker in several.workers for line in worker.said("not accepting")]
        assert warned and {line["reason"] for line in warned} == {"max-connections"}
        assert len(warned) <= len(several.workers)


def test_a_place_that_comes_free_in_one_worker_is_given_away_at_once_by_another() -> None:
    """The one that has left takes nobody; the other one is told by the doorbell."""
    with Several(most=8) as several:
        held = several.hold(0, 8)
        several.workers[0].leave()
        wait_until(lambda: several.states[0] == scoreboard.ABSENT, "it has left")
        waits = []
        for client in held:
            waiting = several.dial()
            wait_until(lambda: several.states[1] == scoreboard.WAITING, "the other one has no room")
            began = time.monotonic()
            loopback.reset(client)
            several.serve()
            waits.append(time.monotonic() - began)
            waiting.sendall(b"x")
        assert median(waits) < SERVED_BY_A_WAKE_UP


def test_the_connections_of_a_worker_that_died_are_others_to_take() -> None:
    with Several(most=6) as several:
        several.hold(0, 6)
        waiting = [several.dial() for _ in range(6)]
        for client in waiting:
            client.sendall(b"me")
        wait_until(lambda: several.states[1] == scoreboard.WAITING, "it has no room")
        several.workers[0].child.kill()
        several.workers[0].child.wait(PATIENCE)
        several.scoreboard.clear(0)  # as the supervisor does
        for _ in waiting:
            assert loopback.read_exactly(several.serve(), 2) == b"me"
        assert several.live == [0, 6]


def test_one_source_gets_so_many_of_all_workers_together() -> None:
    with Several(max_per_source=4) as several:
        clients = [several.connect() for _ in range(4)]
        assert min(several.live) > 0, several.live
        for _ in range(6):
            with suppress(ConnectionResetError):
                assert loopback.read_to_end(several.dial()) == (b"", RST)
        several.connect(source="127.0.0.2")
        for end in clients[0]:
            end.close()
        wait_until(lambda: sum(several.live) == 4, "one has gone")
        several.connect()
        assert several.closed("over-limit") == 6


def rush(several: Several, count: int) -> list[socket.socket]:
    """So many clients, of which no worker knows before all are there."""
    for worker in several.workers:
        worker.stand_still()
    clients = [several.dial() for _ in range(count)]
    for worker in several.workers:
        worker.child.send_signal(signal.SIGCONT)
    return clients


def test_clients_that_come_all_at_once_get_all_that_there_is_and_no_more() -> None:
    with Several(3, most=4) as several:
        for number in range(1, 16):
            clients = rush(several, 8)
            served = [several.serve() for _ in range(4)]
            several.server.settimeout(0.03)
            with pytest.raises(TimeoutError):
                several.server.accept()
            several.server.settimeout(PATIENCE)
            for client in clients:
                loopback.reset(client)
            for server in served:
                loopback.reset(server)
            wait_until(lambda number=number: several.accepted == 8 * number, "all were let in")  # type: ignore
            wait_until(lambda: sum(several.live) == 0, "all are gone")
            several.server.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    several.server.accept()[0].close()
            several.server.settimeout(PATIENCE)


def test_clients_of_one_source_that_come_all_at_once_get_all_that_they_may_have() -> None:
    """Two workers that look at the same moment must not both refuse the last one."""
    with Several(3, max_per_source=4) as several:
        for number in range(1, 9):
            clients = rush(several, 9)
            served = [several.serve() for _ in range(4)]
            wait_until(lambda number=number: several.closed("over-limit") == 5 * number, "5 are refused")
            for end in (*clients, *served):
                loopback.reset(end)
            wait_until(lambda: sum(several.live) == 0, "all are gone")


def test_orders_come_to_a_worker_process_and_signals_do_not() -> None:
    """A terminal or a service manager may send them to all processes of the relay."""
    with Several(1) as several:
        client, server = several.connect()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            several.workers[0].child.send_signal(number)
        several.connect()
        several.workers[0].leave()
        wait_until(lambda: several.states == [scoreboard.ABSENT], "it leaves")
        client.sendall(b"still")
        assert loopback.read_exactly(server, 5) == b"still"
        several.workers[0].control.close()
        assert several.workers[0].child.wait(PATIENCE) == 0
        assert loopback.read_to_end(client)[1] == RST
