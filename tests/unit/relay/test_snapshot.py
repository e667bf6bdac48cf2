"""What can be said of a live connection, and which of its timeouts run."""

import socket
import time

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from desks import DeskMaker, target_of
from loopback import FIN

from tproxy_relay.net import endpoint
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import snapshot

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_idle_is_overdue_after_the_timeout_without_a_byte(desks: DeskMaker, server: socket.socket) -> None:
    desk = desks(target_of(server), idle_timeout=10.0, half_close_timeout=5.0)
    with desk.dial() as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            upstream.send(b"x")
            client.recv(1)
            wait_until(lambda: started.moved[1] == 1, "it is counted")
            now = time.monotonic()
            assert snapshot.overdue(started, now) is None
            assert snapshot.overdue(started, now + 9) is None
            assert snapshot.overdue(started, now + 11) is Outcome.IDLE
            client.shutdown(socket.SHUT_WR)
            assert loopback.read_to_end(upstream) == (b"", FIN)
            assert snapshot.overdue(started, time.monotonic() + 4) is None
            assert snapshot.overdue(started, time.monotonic() + 6) is Outcome.HALF_CLOSE_TIMEOUT
    desk.await_end()


def test_nothing_is_overdue_without_timeouts_or_while_connecting(desks: DeskMaker, server: socket.socket) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        started = desk.accept()
        assert snapshot.overdue(started, time.monotonic() + 1e6) is None
        desk.threads.run(started.run)
        with server.accept()[0] as upstream:
            upstream.send(b"x")
            client.recv(1)
            client.shutdown(socket.SHUT_WR)
            assert loopback.read_to_end(upstream) == (b"", FIN)
            assert snapshot.overdue(started, time.monotonic() + 1e6) is None
    desk.await_end()


def test_a_snapshot_shows_it_live(desks: DeskMaker, server: socket.socket) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            client.send(b"abc")
            upstream.recv(3)
            upstream.send(b"de")
            client.recv(2)
            wait_until(lambda: started.moved[1] == 2, "it is counted")
            wait_until(lambda: started.moved[0] == 3, "it is counted")
            shown = snapshot.summary(started)
            assert (shown["id"], shown["state"], shown["bytes_up"]) == ("c1", "open", 3)
            assert shown["client"] == str(endpoint.from_sockaddr(client.getsockname()))
            assert shown["upstream_local"] == str(endpoint.from_sockaddr(upstream.getpeername()))
            assert 0 <= shown["idle_seconds"] <= shown["seconds"] < PATIENCE  # type: ignore[operator]
            client.shutdown(socket.SHUT_WR)
            assert loopback.read_to_end(upstream) == (b"", FIN)
            assert snapshot.state(started) == "half-closed"
    desk.await_end()
