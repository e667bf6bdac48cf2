"""Resets on sockets that no thread reads any more.

When one side has sent its FIN, its pump is done and its thread is free. If that side then resets the
connection (a server that answered early and closed, while the client still uploads), the kernel tells only
whoever asks: epoll does, with an empty set of events, because errors and hang-ups are always reported.
"""

import select
import threading

from tproxy_relay.relay import pumps


class Hangups:
    """The legs that are watched in the main thread's epoll. `pumps.HangupWatch` for the relays."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[pumps.Relay, pumps.Leg]] = {}
        self._undecided: list[tuple[pumps.Relay, pumps.Leg]] = []

    def add(self, owner: pumps.Relay, leg: pumps.Leg) -> None:
        """Watch a leg until it hangs up once. OSError if the kernel has no memory for it."""
        fd = leg.sock.fileno()
        with self._lock:
            self._epoll.register(fd, select.EPOLLONESHOT)
            self._watched[fd] = (owner, leg)  # after that, or `discard` would fail too

    def discard(self, leg: pumps.Leg) -> None:
        """Stop watching, before the descriptor is closed or our own FIN makes it hang up."""
        fd = leg.sock.fileno()
        with self._lock:
            if self._watched.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def on_readable(self, fd: int) -> None:
        """The epoll reported this descriptor; `settle` deals with it. One that was closed meanwhile is not ours."""
        with self._lock:
            watched = self._watched.get(fd)
        if watched is not None:
            self._undecided.append(watched)

    def settle(self) -> bool:
        """Deal with the legs that hung up. True if some must be asked again soon. Main thread only."""
        self._undecided = [(owner, leg) for owner, leg in self._undecided if not owner.hang_up(leg)]
        return bool(self._undecided)
