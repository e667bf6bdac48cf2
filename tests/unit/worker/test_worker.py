"""A worker in a thread, from its first order to its last. Whom it lets in: test_admission.py and test_balance.py."""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from lines import fields
from loopback import FIN, RST
from rows import Seen
from workers import Running

from tproxy_relay.ipc import scoreboard
from tproxy_relay.net import endpoint, orig_dst
from tproxy_relay.relay.connection import THREADS, Connection
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.worker import admission
from tproxy_relay.worker import worker as worker_module
from tproxy_relay.worker.messages import Abort, Leave, LogLive, Order, Stop

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


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
    assert all(re.fullmatch(f"{os.getpid():x}-[0-9a-f]+-[0-9a-f]+", one) for one in ids)


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


def test_one_source_gets_so_many_within_a_second_and_others_are_still_served() -> None:
    with Running(max_connections=100, max_rate_per_source=5) as running:
        began = time.monotonic()
        refused = 0
        while refused < 3 and time.monotonic() - began < PATIENCE:
            before = len(running.lines.of("connection closed"))
            with suppress(ConnectionResetError):  # the relay may be quicker
                loopback.reset(running.dial())
            refused += running.lines.closed(before + 1)[-1]["outcome"] == "over-limit"
        accepted = running.slot.numbers.accepted
        seconds = time.monotonic() - began
        assert 5 <= accepted - refused <= 5 * (seconds + 1)
        line = next(line for line in running.lines.closed() if line["outcome"] == "over-limit")
        assert line["error"] == "127.0.0.1 has opened 5 connections within a second (max-rate-per-source)"
        other = running.dial(source="127.0.0.2")
        other.sendall(b"hi")
        while not is_greeted(running.serve()):
            pass  # those of the first source that were served


def is_greeted(server: socket.socket) -> bool:
    try:
        return server.recv(2) == b"hi"
    except ConnectionResetError:
        return False


# --- orders to end


ENDS = [Stop(), None]
"""The order, and the end of the supervisor."""
LEAVE = Leave(None, 0.0, 30.0)


def is_refused_at_all(running: Running) -> bool:
    """Nobody listens any more."""
    try:
        running.dial()
    except ConnectionRefusedError:
        return True
    return False


def test_it_leaves_and_finishes_what_there_is(running: Running) -> None:
    client, server = running.connect()
    running.leave()
    wait_until(lambda: running.left, "it leaves")
    assert is_refused_at_all(running)
    assert running.slot.state == scoreboard.ABSENT
    client.sendall(b"still served")
    assert loopback.read_exactly(server, 12) == b"still served"
    server.close()
    assert loopback.read_to_end(client) == (b"", FIN)
    client.close()
    running.await_end(1)
    assert running.lines.outcomes() == ["completed"]
    assert running.slot.numbers == (1, 0, {"completed": 1})


def test_without_connections_it_leaves_at_once(running: Running) -> None:
    running.leave()
    running.await_end(1)
    assert running.slot.numbers == (0, 0, {})


def test_clients_whose_handshake_was_under_way_are_served_when_it_leaves(running: Running) -> None:
    running.leave(grace=2 * PATIENCE)
    wait_until(lambda: running.leaving, "it leaves")
    client, server = running.connect()
    assert not running.left
    assert running.slot.state == scoreboard.ABSENT, "other workers must not count on it"
    client.close()
    server.close()
    wait_until(lambda: running.lines.outcomes() == ["completed"], "it is served to its end")
    running.order(Stop())
    running.await_end(1)


def test_the_clients_of_some_listeners_are_its_own_to_the_last() -> None:
    """After a reload nobody else hears of those that have no listener any more."""
    with Running(listeners=3) as running:
        kept = str(running.addresses[1])
        running.leave(listeners=[kept], grace=2 * PATIENCE)
        wait_until(lambda: running.leaving, "it leaves")
        client = running.dial(1)
        client.sendall(b"me")
        assert loopback.read_exactly(running.serve(), 2) == b"me"
        for number in (0, 2):
            with pytest.raises(ConnectionRefusedError):
                running.dial(number)
        running.order(Stop())


def test_what_waits_for_others_is_left_to_them() -> None:
    """After a reload the next generation serves the backlog of the listeners that stay."""
    with Running(start=False) as running, socket.socket(fileno=os.dup(running.flaky[0].fileno())) as others:
        waiting = running.dial()
        waiting.sendall(b"me")
        running.leave(listeners=[])
        running.worker.leave(Leave((), 0.0, None))
        running.thread.start()
        running.await_end(1)
        assert running.slot.numbers.accepted == 0
        with others.accept()[0] as taken:
            assert loopback.read_exactly(taken, 2) == b"me"


def test_waiting_for_latecomers_ends_by_itself() -> None:
    with Running() as running:
        began = time.monotonic()
        running.leave(grace=0.3)
        running.await_end(2)
        assert 0.3 <= time.monotonic() - began < 1


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_the_end_ends_the_wait_for_latecomers(running: Running, end: Order | None) -> None:
    running.connect()
    running.leave(grace=2 * PATIENCE)
    wait_until(lambda: running.leaving, "it leaves")
    running.order(end)
    running.await_end(2)
    assert running.lines.outcomes() == ["aborted"]


def test_the_drain_ends_with_its_deadline(running: Running) -> None:
    client, server = running.connect()
    began = time.monotonic()
    running.leave(timeout=0.4)
    running.await_end(3)
    assert 0.35 < time.monotonic() - began < 2
    assert running.lines.outcomes() == ["drained"]
    assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST
    assert running.slot.numbers.closed == {"drained": 1}


def test_the_time_for_the_drain_begins_after_the_latecomers(running: Running) -> None:
    running.connect()
    began = time.monotonic()
    running.leave(grace=0.3, timeout=0.3)
    running.await_end(3)
    assert 0.55 < time.monotonic() - began < 2


def test_a_drain_timeout_of_nothing_waits_for_nothing(running: Running) -> None:
    running.connect()
    running.leave(timeout=0.0)
    running.await_end(1)
    assert running.lines.outcomes() == ["drained"]


def test_a_later_order_may_bring_a_deadline(running: Running) -> None:
    """A worker of an old generation has all the time it likes, until the relay is stopped."""
    client, server = running.connect()
    running.leave(timeout=None)
    wait_until(lambda: running.left, "it leaves")
    client.sendall(b"x")
    assert server.recv(1) == b"x"
    began = time.monotonic()
    running.leave(timeout=0.3)
    running.await_end(2)
    assert 0.25 < time.monotonic() - began < 1.5
    assert running.lines.outcomes() == ["drained"]


@pytest.mark.parametrize("end", ENDS, ids=str)
def test_the_end_ends_the_drain(running: Running, end: Order | None) -> None:
    client, server = running.connect()
    running.leave()
    wait_until(lambda: running.left, "it leaves")
    running.order(end)
    running.await_end(2)
    assert running.lines.outcomes() == ["aborted"]
    assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST
    assert bool(running.lines.of("the supervisor is gone")) == (end is None)


@pytest.mark.parametrize("orders", [(Stop(),), (None,), (LEAVE, Stop()), (Stop(), LEAVE), (LEAVE, None)], ids=str)
def test_the_end_does_not_drain_whatever_else_was_said(running: Running, orders: tuple[Order | None, ...]) -> None:
    running.connect()
    for order in orders:
        running.order(order)
    running.await_end(2)
    assert running.lines.outcomes() == ["aborted"]


def test_showing_what_is_live_does_not_end_a_drain(running: Running) -> None:
    client, server = running.connect()
    running.leave()
    wait_until(lambda: running.left, "it leaves")
    running.order(LogLive())
    wait_until(lambda: running.lines.of("connection live"), "it obeys")
    client.send(b"x")
    assert server.recv(1) == b"x"
    server.close()
    client.close()
    running.await_end(1)
    assert running.lines.outcomes() == ["completed"]


def test_a_connection_that_is_connecting_is_ended_too() -> None:
    with (
        loopback.full_backlog() as address,
        Running(connect_timeout=30.0, target=endpoint.from_sockaddr(address)) as running,
    ):
        client = running.dial()
        wait_until(lambda: connecting(running.worker.live), "it connects")
        running.order(Stop())
        running.await_end(2)
        assert running.lines.outcomes() == ["aborted"]
        assert loopback.read_to_end(client)[1] == RST


def connecting(live: list[Connection]) -> bool:
    """True while the first of them waits for the answer to its SYN."""
    return bool(live) and live[0].upstream_leg is not None


def test_a_connection_whose_send_is_stuck_is_ended_in_time(running: Running) -> None:
    client, _server = running.connect()
    loopback.fill(client)
    began = time.monotonic()
    running.order(Stop())
    running.await_end(3)
    assert time.monotonic() - began < worker_module.ABORT_GRACE + 0.3
    assert running.lines.outcomes() == ["aborted"]


def test_a_connection_whose_thread_never_returns_is_recorded_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "ABORT_GRACE", 0.3)
    go = threading.Event()
    pools: list[ThreadPool] = []

    def pool(limit: int) -> ThreadPool:
        pools.append(ThreadPool(limit))
        return pools[-1]

    def hang(*_args: object) -> None:
        go.wait(20)

    monkeypatch.setattr(orig_dst, "original_destination", hang)
    monkeypatch.setattr(worker_module, "ThreadPool", pool)
    with Running() as running:
        running.dial()
        wait_until(lambda: len(running.worker.live), "it is accepted")
        (stuck,) = running.worker.live
        running.order(Stop())
        running.await_end(2)
        (line,) = running.lines.closed()
        assert (line["outcome"], line["error"]) == ("aborted", "its threads did not end in time")
        assert running.slot.numbers == (1, 0, {"aborted": 1})
        go.set()
        wait_until(lambda: stuck.destination, "it goes on")
        pools[0].release(THREADS)
        wait_until(lambda: not any(one.name.startswith("relay") for one in threading.enumerate()), "its thread ends")
        stuck.client_leg.sock.close()  # what the end of the process does


# --- other orders, and the clock


def test_it_shows_what_is_live(running: Running) -> None:
    client, server = running.connect()
    client.send(b"abc")
    server.recv(3)
    wait_until(lambda: running.worker.live[0].moved[0] == 3, "it is counted")
    done, other = running.connect()
    done.close()
    other.close()
    running.lines.closed()
    running.order(LogLive())
    wait_until(lambda: running.lines.of("connection live"), "they are said")
    (live,) = running.lines.of("connection live")
    assert fields(live)["client"] == str(endpoint.from_sockaddr(client.getsockname()))
    assert (fields(live)["state"], fields(live)["bytes_up"]) == ("open", 3)
    assert running.slot.numbers == (2, 1, {"completed": 1})


def aborted(running: Running, number: str) -> object:
    """The worker's answer to the order to abort the connection with that id."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            running.control.send(Abort(number, 1000).to_message(), [theirs.fileno()])
        ours.settimeout(PATIENCE)
        return json.loads(loopback.read_to_end(ours)[0])


def test_one_connection_is_aborted_by_its_id(running: Running) -> None:
    client, server = running.connect()
    other, _ = running.connect()
    first = running.worker.live[0].id
    assert aborted(running, first) == {"aborted": True}
    assert running.lines.outcomes() == ["aborted"]
    assert loopback.read_to_end(client)[1] == loopback.read_to_end(server)[1] == RST
    assert fields(running.lines.of("aborted by an operator")[0]) == {"id": first, "account": 1000}
    wait_until(lambda: len(running.worker.live) == 1, "the other one is left")
    assert aborted(running, first) == {"aborted": False}
    other.send(b"x")


@pytest.mark.parametrize("leaving", [False, True])
def test_it_shows_signs_of_life_as_long_as_it_lives(leaving: bool) -> None:
    with Running(stall_timeout=0.4) as running:
        running.connect()
        if leaving:
            running.leave()
        silences = []
        deadline = time.monotonic() + 0.8
        while time.monotonic() < deadline:
            silences.append(running.slot.scoreboard.silence(0))
            time.sleep(0.005)
        assert 0.05 < max(silences) < 0.3, "it beats, and it does not spin"


def test_where_nobody_waits_for_them_there_are_no_signs_of_life() -> None:
    with Running(stall_timeout=0.0) as running:
        running.connect()
        wait_until(lambda: not running.trimming or running.slot.scoreboard.silence(0) > 0.3, "it sleeps")


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


@pytest.mark.row("F6", "half-closed and then silent", "both reset after half-close-timeout")
def test_half_closed_connections_have_their_own_timeout(seen: Seen) -> None:
    with Running(half_close_timeout=0.3) as running:
        open_client, _open_server = running.connect()
        client, server = running.connect()
        client.shutdown(socket.SHUT_WR)
        assert loopback.read_to_end(server) == (b"", FIN)
        assert running.lines.outcomes() == ["half-close-timeout"]
        assert loopback.read_to_end(client)[1] == RST
        open_client.send(b"x")
        wait_until(lambda: len(running.worker.live) == 1, "the other one is left")
    seen("both reset, half-close-timeout")


def test_idle_connections_are_reset_while_draining_too() -> None:
    with Running(idle_timeout=0.3) as running:
        running.connect()
        running.leave(timeout=20.0)
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
    running.leave()
    wait_until(lambda: running.left, "it leaves")
    loopback.reset(server)
    running.await_end(2)
    assert running.lines.outcomes() == ["upstream-reset"]


def test_threads_that_nobody_needs_any_more_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "TRIM_INTERVAL", 0.1)

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
        wait_until(lambda: pool() <= at_rest + 2, "the pool shrinks")
        wait_until(lambda: not running.trimming, "and the clock stops")
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
    assert running.slot.numbers == (21, 1, {"client-reset": 7, "completed": 7, "upstream-reset": 6})
