"""What a worker takes from its listeners, from the first client to the last."""

import errno
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from lines import fields
from loopback import FIN
from workers import Running, Several

from tproxy_relay.ipc import scoreboard
from tproxy_relay.worker import acceptor

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def running() -> Iterator[Running]:
    with Running() as started:
        yield started


# --- when it is full


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


# --- errors of accept()


@pytest.mark.parametrize("number", sorted(acceptor.ABOUT_THAT_CONNECTION))
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
