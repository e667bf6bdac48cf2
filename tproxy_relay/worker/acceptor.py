"""The listeners of a worker: whoever comes there is accepted and handed to admission.py.

All workers share the listening sockets. Which of them takes the next client is decided in balance.py. While there is no
room for a client this worker does not watch the listeners, and clients wait in the kernel's backlog.
"""

import errno
import os
import select
import time
from collections.abc import Sequence

from tproxy_relay.ipc import scoreboard
from tproxy_relay.net import endpoint, listeners
from tproxy_relay.net.listeners import Listener
from tproxy_relay.worker.admission import Admission
from tproxy_relay.worker.balance import REST_PAUSE, Balance

ACCEPT_BATCH = 64
"""Connections taken from one listener before the others, and the orders, get their turn."""
CAPACITY_PAUSE = 0.1
"""Seconds between two tries when descriptors, memory or threads have run out."""

ABOUT_THAT_CONNECTION = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,  # a firewall rule
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
    }
)
"""accept(2): Linux hands errors of the new connection to accept(). The next one is fine."""

_ABOUT_CAPACITY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""accept(2): the connection stays in the backlog, and the listener stays readable: go on at once and the loop
spins. Everything else is about us, and raised."""


class Acceptor:
    """The listeners in a worker's epoll. Main thread only."""

    events = select.EPOLLIN | select.EPOLLEXCLUSIVE
    """Of a listener, for the epoll."""

    def __init__(
        self, epoll: select.epoll, open_listeners: Sequence[Listener], balance: Balance, admission: Admission
    ) -> None:
        self._epoll = epoll
        self._listeners = list(open_listeners)
        self._balance = balance
        self._admission = admission
        self._by_fd: dict[int, Listener] = {}
        self._poll_at: float | None = None

    def start(self) -> None:
        """Watch the listeners and the doorbell, and take clients from now on."""
        self._epoll.register(self._balance.doorbell, select.EPOLLIN | select.EPOLLET)
        self._watch()

    def on_readable(self, fd: int) -> bool:
        """The epoll reported this descriptor. False if it is none of these."""
        if fd in self._by_fd:
            self._accept_from(self._by_fd[fd])
        elif fd == self._balance.doorbell:
            self._poll()
        else:
            return False
        return True

    @property
    def due(self) -> float | None:
        """When `keep_time` has something to do (time.monotonic())."""
        return self._poll_at

    def keep_time(self, now: float) -> None:
        """Do whatever is due by `now` (time.monotonic())."""
        if self._admission.room_came or self._poll_at is not None and now >= self._poll_at:
            if self._balance.sample() and self._somebody_waits():
                self._balance.distrust(now)
            self._poll()

    def _poll(self) -> None:
        """Something has changed, or may have."""
        if self._admission.full is not None:
            self._try_again()
        elif self._by_fd:
            self._poll_at = self._balance.poll_at
            for listener in list(self._by_fd.values()):
                self._accept_from(listener)
        elif self._balance.is_needed():
            self._watch()
        else:
            self._poll_at = time.monotonic() + REST_PAUSE

    # --- the listeners

    @property
    def listening(self) -> list[str]:
        """Names of the listeners that this worker still has."""
        return [listener.name for listener in self._listeners]

    def _watch(self) -> None:
        self._balance.show(scoreboard.WATCHING)
        self._poll_at = self._balance.poll_at
        for listener in self._listeners:
            self._by_fd[listener.sock.fileno()] = listener
            self._epoll.register(listener.sock.fileno(), self.events)

    def _unwatch(self, state: int) -> None:
        self._balance.show(state)
        for fd in self._by_fd:
            self._epoll.unregister(fd)
        self._by_fd.clear()

    def _somebody_waits(self) -> bool:
        poll = select.poll()
        for listener in self._listeners:
            poll.register(listener.sock.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    # --- one client

    def _accept_from(self, listener: Listener) -> bool:
        """Take a batch of clients in. True if more may be waiting, and are this worker's."""
        for _ in range(ACCEPT_BATCH):
            if not self._let_in(listener) or not self._balance.goes_on() and self._rest():
                return False
        return True

    def _let_in(self, listener: Listener) -> bool:
        """The next client. False if there is none, or if it has to wait."""
        lack = self._admission.lack()
        if lack is None:
            with self._admission.turn() as admitted:
                if admitted:
                    return self._accept_one(listener)
            lack = "max-connections"
        if self._admission.refuses:
            return self._accept_one(listener, lack)
        self._wait(lack)
        return False

    def _accept_one(self, listener: Listener, lack: str | None = None) -> bool:
        try:
            sock, sockaddr = listener.sock.accept()
        except BlockingIOError:
            return False  # the backlog is empty, or somebody else was quicker
        except OSError as error:
            if error.errno in _ABOUT_CAPACITY:
                self._wait(os.strerror(error.errno))
                return False
            if error.errno not in ABOUT_THAT_CONNECTION:
                raise
            return True
        client = endpoint.from_sockaddr(sockaddr)
        if lack is None:
            self._admission.admit(sock, client, listener)
        else:
            self._admission.refuse(sock, client, listener, lack)
        return True

    def _rest(self) -> bool:
        """Leave the next clients to another worker. False if there is none that takes them after all."""
        self._unwatch(scoreboard.RESTING)
        if self._balance.is_needed():
            self._watch()  # the other one has begun to rest in the same moment, trusting in us
            return False
        self._balance.begin_rest()
        self._poll_at = time.monotonic() + REST_PAUSE
        if self._somebody_waits():
            self._balance.ring()  # the kernel may have woken nobody but us for that client
        return True

    # --- no room

    def _wait(self, why: str) -> None:
        """Leave new clients in the backlog until a connection ends, or for CAPACITY_PAUSE seconds."""
        self._admission.await_room(why)
        self._poll_at = time.monotonic() + CAPACITY_PAUSE
        self._unwatch(scoreboard.WAITING)
        if self._admission.evicts and self._somebody_waits():
            self._admission.evict()

    def _try_again(self) -> None:
        """There may be room again: for all that wait, or only for some of them."""
        why = self._admission.retry()
        self._watch()
        for listener in list(self._by_fd.values()):
            self._accept_backlog(listener)
        if self._admission.full is None:
            self._admission.report_room(why)

    # --- the end

    def leave(self, names: Sequence[str] | None) -> None:
        """Have nothing to do with new clients any more, but for those of the listeners of these names (None: all)."""
        self._admission.retry()
        self._balance.leave()
        self._unwatch(scoreboard.ABSENT)
        self._epoll.unregister(self._balance.doorbell)
        self._balance.ring()  # others may rest because of this one
        kept = [listener for listener in self._listeners if names is None or listener.name in names]
        listeners.close_all([listener for listener in self._listeners if listener not in kept])
        self._listeners = kept
        self._watch()

    def take_backlog(self) -> None:
        """The clients that the kernel has promised the connection to; not those that come for ever."""
        for listener in list(self._by_fd.values()):
            self._accept_backlog(listener)

    def _accept_backlog(self, listener: Listener) -> None:
        for _ in range(listeners.BACKLOG // ACCEPT_BATCH):
            if not self._by_fd or not self._accept_from(listener):
                return

    def close(self) -> None:
        """Close the listeners and give the threads back."""
        self._unwatch(scoreboard.ABSENT)
        listeners.close_all(self._listeners)
        self._admission.close()
