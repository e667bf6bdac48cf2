"""Who is let in and who is not: one worker in a thread, and some processes that have room together."""

import logging
import signal
import socket
import threading
import time
from contextlib import suppress

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from lines import fields
from loopback import RST
from workers import SERVED_BY_A_WAKE_UP, Running, Several, median

from tproxy_relay.ipc import scoreboard
from tproxy_relay.net.endpoint import from_sockaddr
from tproxy_relay.relay import snapshot
from tproxy_relay.relay.connection import THREADS
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.worker import eviction

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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
        assert len(running.worker.live) == 3
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
        assert len(running.worker.live) == 3
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
        reserve, pairs = ThreadPool.reserve, [THREADS]
        monkeypatch.setattr(ThreadPool, "reserve", lambda pool, count: bool(pairs) and reserve(pool, pairs.pop()))
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

        def rests_longest() -> bool:
            """A thread notes that a byte has moved after it has sent it: on a busy machine, much later."""
            for client, server in (served[0], served[2]):
                client.sendall(b"busy")
                assert loopback.read_exactly(server, 4) == b"busy"
            oldest = min(running.worker.live, key=snapshot.moved_at)
            return oldest.client == from_sockaddr(idlest[0].getsockname())

        wait_until(rests_longest, "the one that nobody uses has rested longest")
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


@pytest.mark.slow
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


def test_a_worker_without_descriptors_says_so_and_leaves_clients_to_the_others() -> None:
    with Running(max_connections=100, room=8) as running:
        for _ in range(8):
            running.connect()
        wait_until(lambda: running.full, "it has no room")
        (line,) = running.lines.of("not accepting")
        assert fields(line) == {"reason": "descriptors", "live": 8}
        assert running.slot.state == scoreboard.WAITING


# --- all workers together


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
