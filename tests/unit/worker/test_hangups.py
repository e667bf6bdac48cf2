"""The watch itself, with a real epoll and sockets that really hang up."""

import select
import socket
from collections.abc import Iterator

import loopback
import pytest
from loopback import Pair

from tproxy_relay.relay.pumps import Leg, Relay
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.worker.hangups import Hangups

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Watch:
    """A Hangups with its epoll, and a relay that nobody runs whose client side has sent its FIN."""

    def __init__(self, server_buffer: int = 0) -> None:
        self.epoll = select.epoll()
        self.hangups = Hangups(self.epoll)
        self.client: Pair = loopback.pair()
        self.upstream: Pair = loopback.pair(receive_buffer=server_buffer)
        self.leg = Leg("client", self.client.near)
        self.relay = Relay(self.leg, Leg("upstream", self.upstream.near), self.hangups, CpuPlacement(None))
        self.client.far.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Everything."""
        for sock in (*self.client, *self.upstream):
            sock.close()
        self.epoll.close()

    def fire(self, seconds: float) -> int:
        """Hand on what the epoll reports, as the main thread does. How many that was."""
        events = self.epoll.poll(seconds)
        for fd, _events in events:
            self.hangups.on_readable(fd)
        self.hangups.settle()
        return len(events)


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def test_a_fin_and_data_are_no_hang_up(watch: Watch) -> None:
    watch.hangups.add(watch.relay, watch.leg)
    watch.client.near.send(b"answer")
    assert watch.fire(0.1) == 0
    assert not watch.hangups.settle()


def test_a_reset_is_reported_once(watch: Watch) -> None:
    watch.hangups.add(watch.relay, watch.leg)
    loopback.reset(watch.client.far)
    assert watch.fire(2) == 1
    assert not watch.hangups.settle()
    assert watch.relay.failed is watch.leg
    assert isinstance(watch.leg.error, ConnectionResetError)
    assert watch.fire(0.05) == 0, "or the main thread spins"
    assert not watch.hangups.settle()


def test_what_is_discarded_is_not_reported(watch: Watch) -> None:
    watch.hangups.add(watch.relay, watch.leg)
    watch.hangups.discard(watch.leg)
    watch.hangups.discard(watch.leg)
    loopback.reset(watch.client.far)
    assert watch.fire(0.1) == 0
    watch.hangups.on_readable(watch.leg.sock.fileno())
    assert not watch.hangups.settle()
    assert watch.relay.failed is None


def test_a_descriptor_that_nobody_watches_is_ignored(watch: Watch) -> None:
    watch.hangups.on_readable(12345)
    assert not watch.hangups.settle()


def test_a_watch_that_fails_leaves_nothing_to_discard(watch: Watch) -> None:
    watch.epoll.register(watch.leg.sock.fileno(), 0)
    with pytest.raises(OSError):
        watch.hangups.add(watch.relay, watch.leg)
    watch.epoll.unregister(watch.leg.sock.fileno())
    watch.hangups.discard(watch.leg)


def test_a_reset_waits_until_the_other_side_has_its_data() -> None:
    watch = Watch(server_buffer=4096)
    slow = watch.upstream
    slow.near.setblocking(False)
    count = slow.near.send(bytes(60_000))
    slow.near.setblocking(True)
    watch.hangups.add(watch.relay, watch.leg)
    loopback.reset(watch.client.far)
    assert watch.fire(2) == 1
    assert watch.relay.failed is None
    assert watch.hangups.settle(), "to be asked again"
    loopback.read_exactly(slow.far, count)
    for _ in range(1000):
        if not watch.hangups.settle():
            break
        select.select([], [], [], 0.002)
    assert watch.relay.failed is watch.leg
    watch.close()
