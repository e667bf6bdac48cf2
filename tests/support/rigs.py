"""Both pumps of a connection between two real ones, without the connection."""

import select
import threading
import time

import loopback
from deadlines import PATIENCE, wait_until

from tproxy_relay.net import sockets
from tproxy_relay.relay.pumps import Leg, Relay
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.worker.hangups import Hangups

ANYWHERE = CpuPlacement(None)


class Rig:
    """client <-> [near | relay | near] <-> server: a Relay in two threads, and the epoll that its watch needs.

    What connection.py does when both pumps have returned (flush, disarm, close) is done here as well.
    """

    def __init__(self, *, client_buffer: int = 0, server_buffer: int = 0) -> None:
        client, upstream = loopback.pair(receive_buffer=client_buffer), loopback.pair(receive_buffer=server_buffer)
        self.client, self.server = client.far, upstream.far
        self.epoll = select.epoll()
        self.watch = Hangups(self.epoll)
        self.relay = Relay(Leg("client", client.near), Leg("upstream", upstream.near), self.watch, ANYWHERE)
        self.lasts: list[bool] = []
        self.over = threading.Event()
        self.flush_seconds = 0.0
        legs = (self.relay.client, self.relay.upstream)
        self._threads = [
            threading.Thread(target=self._carry, args=legs, name="up"),
            threading.Thread(target=self._carry, args=legs[::-1], name="down"),
        ]
        self._watcher = threading.Thread(target=self._watch, name="watch")

    def __enter__(self) -> "Rig":
        for thread in (*self._threads, self._watcher):
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.client.close()
        self.server.close()
        if not self.over.wait(0.5):
            self.relay.abort()
        assert self.over.wait(PATIENCE), "the pumps did not end"
        for thread in (*self._threads, self._watcher):
            thread.join(PATIENCE)
        self.epoll.close()

    def _carry(self, src: Leg, dst: Leg) -> None:
        last = self.relay.carry(src, dst)
        self.lasts.append(last)
        if not last:
            return
        began = time.monotonic()
        if self.relay.failed:
            self.relay.flush()
        self.flush_seconds = time.monotonic() - began
        for leg in (src, dst):
            if self.relay.clean:
                sockets.finish_with_fin(leg.sock)
            leg.sock.close()
        self.over.set()

    def _watch(self) -> None:
        while not self.over.is_set():
            for fd, _events in self.epoll.poll(0.02):
                self.watch.on_readable(fd)
            self.watch.settle()

    def ended(self, seconds: float = PATIENCE) -> Relay:
        """The relay, once both pumps have returned and the sockets are closed."""
        assert self.over.wait(seconds), f"the relay did not end within {seconds} s"
        wait_until(lambda: len(self.lasts) == 2, "both pumps return")
        return self.relay
