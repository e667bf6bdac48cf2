"""Who is let in, and by which worker: the listeners, the limits, and the balance between the workers.

All workers share the listening sockets, so a connection that waits in the backlog is served by whoever is there,
also when a worker has just died. Left to itself the kernel would wake the same worker again and again. So a worker
that has clearly more connections than another one leaves new clients to that one: it rests, and looks now and then
whether a client has to wait. tests/bench/accept_sharing.py compares the ways to do it.

A connection is admitted only if there is room for it and both its threads are set aside. Otherwise this
worker waits, and clients wait in the kernel's backlog until somebody leaves.
"""

import errno
import functools
import logging
import os
import select
import socket
import time
from collections.abc import Callable, Sequence

from tproxy_relay.ipc import scoreboard
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net import endpoint, listeners
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.relay.connection import THREADS
from tproxy_relay.relay.thread_pool import ThreadPool

ACCEPT_BATCH = 64
"""Connections taken from one listener before the others, and the orders, get their turn."""
CAPACITY_PAUSE = 0.1
"""Seconds between two tries when descriptors, memory or threads have run out."""
TELL_PAUSE = 1.0
"""Seconds from one line about a full relay to the next one."""
REST_PAUSE = 0.1
"""Seconds between two looks of a worker that leaves new clients to others: the longest that a client waits when those
others have just been stopped."""
WATCH_PAUSE = 0.25
"""Seconds between two looks of a worker that takes new clients and has others beside it: the kernel tells only one of
them of a client (EPOLLEXCLUSIVE of epoll_ctl(2)), and that one may have been stopped in the same moment."""
DISTRUST = 2.0
"""Seconds for which a worker leaves no clients to others after it has seen that those do not take them."""

_ABOUT_THAT_CONNECTION = frozenset(
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

log = logging.getLogger(__name__)

WAIT, REFUSE, EVICT = "wait", "refuse", "evict"
"""What becomes of a client for which there is no room."""

Admit = Callable[[socket.socket, Endpoint, Listener], None]
"""What becomes of an accepted connection; its threads are set aside."""
Refuse = Callable[[str, socket.socket, Endpoint, Listener], None]
"""The same where there is no room, after what there is too little of; no threads are set aside."""


class Acceptor:
    """The listeners in a worker's epoll. Main thread only, but for `one_has_ended`."""

    def __init__(
        self,
        epoll: select.epoll,
        open_listeners: Sequence[Listener],
        slot: Slot,
        threads: ThreadPool,
        *,
        most: int,
        room: int,
        admit: Admit,
        when_full: str,
        refuse: Refuse,
        make_room: Callable[[], bool],
    ) -> None:
        """`most` connections in the whole relay, and `room` for so many in this worker. `make_room` has a connection
        end, if it can."""
        self._epoll = epoll
        self._listeners = list(open_listeners)
        self._slot = slot
        self._threads = threads
        self._most = most
        self._room = room
        self._admit = admit
        self._when_full = when_full
        self._refuse = refuse
        self._make_room = make_room
        self._by_fd: dict[int, Listener] = {}
        self._pair_reserved = False
        self._full: str | None = None
        self._told_of_it = False
        self._tell_at = 0.0
        self._someone_left = False
        self._look_at: float | None = None
        self._accepted = 0
        self._distrust_until = 0.0
        self._leaving = False

    def start(self) -> None:
        """Take clients from now on."""
        self._epoll.register(self._slot.scoreboard.doorbell, select.EPOLLIN | select.EPOLLET)
        self._watch()

    def fired(self, fd: int) -> bool:
        """The epoll reported this descriptor. False if it is none of these."""
        if fd in self._by_fd:
            self._accept_from(self._by_fd[fd])
        elif fd == self._slot.scoreboard.doorbell:
            self._look()
        else:
            return False
        return True

    @property
    def due(self) -> float | None:
        """When `keep_time` has something to do (time.monotonic())."""
        return self._look_at

    def keep_time(self, now: float) -> None:
        """Whatever is due by now."""
        if self._full is not None and self._someone_left or self._look_at is not None and now >= self._look_at:
            self._watch_others(now)
            self._look()

    def _look(self) -> None:
        """Something has changed."""
        if self._full is not None:
            self._try_again()
        elif self._by_fd:
            self._look_at = self._next_look()
            for listener in list(self._by_fd.values()):
                self._accept_from(listener)
        elif self._is_needed():
            self._watch()
        else:
            self._look_at = time.monotonic() + REST_PAUSE

    # --- the listeners

    def _watch(self) -> None:
        self._show(scoreboard.WATCHING)
        self._look_at = self._next_look()
        for listener in self._listeners:
            self._by_fd[listener.sock.fileno()] = listener
            self._epoll.register(listener.sock.fileno(), select.EPOLLIN | select.EPOLLEXCLUSIVE)

    def _next_look(self) -> float | None:
        return None if self._slot.alone else time.monotonic() + WATCH_PAUSE

    def _show(self, state: int) -> None:
        """To the other workers, which count on one that leaves no more."""
        self._slot.state = scoreboard.ABSENT if self._leaving else state

    def _unwatch(self, state: int) -> None:
        self._show(state)
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
        return all(self._let_in(listener) and not self._rests() for _ in range(ACCEPT_BATCH))

    def _let_in(self, listener: Listener) -> bool:
        """The next client. False if there is none, or if it has to wait."""
        lack = self._lack()
        if lack is None:
            with self._slot.admission(self._most) as admitted:
                if admitted:
                    return self._accept_one(listener, self._admit_with_threads)
            lack = "max-connections"
        if self._when_full == REFUSE:
            return self._accept_one(listener, functools.partial(self._refuse, lack))
        self._wait(lack)
        return False

    def _admit_with_threads(self, sock: socket.socket, client: Endpoint, listener: Listener) -> None:
        self._pair_reserved = False
        self._admit(sock, client, listener)

    def _accept_one(self, listener: Listener, then: Admit) -> bool:
        try:
            sock, sockaddr = listener.sock.accept()
        except BlockingIOError:
            return False  # the backlog is empty, or somebody else was quicker
        except OSError as error:
            if error.errno in _ABOUT_CAPACITY:
                self._wait(os.strerror(error.errno))
                return False
            if error.errno not in _ABOUT_THAT_CONNECTION:
                raise
            return True
        then(sock, endpoint.from_sockaddr(sockaddr), listener)
        return True

    def _lack(self) -> str | None:
        """What this worker has too little of for one more connection. None with two threads set aside, and descriptors
        left for a connection of theirs."""
        if self._slot.live >= self._room:
            return "descriptors" if self._room < self._most else "max-connections"
        if not self._pair_reserved and not self._threads.reserve(THREADS):
            return "no more threads"
        self._pair_reserved = True
        return None

    # --- leaving clients to other workers

    def _is_needed(self) -> bool:
        """True if no other worker is to take the next clients."""
        return self._distrust_until > time.monotonic() or not self._slot.fewer_elsewhere(scoreboard.WATCHING)

    def _watch_others(self, now: float) -> None:
        """One that has been stopped seems to watch the listeners, too."""
        accepted = self._slot.accepted_everywhere
        if self._slot.state == scoreboard.RESTING and accepted == self._accepted and self._somebody_waits():
            self._distrust_until = now + DISTRUST
        self._accepted = accepted

    def _rests(self) -> bool:
        """True if another worker is to take the next clients."""
        if self._leaving:
            return False
        if self._is_needed():
            if self._slot.fewer_elsewhere(scoreboard.RESTING):
                self._slot.scoreboard.ring()
            return False
        self._unwatch(scoreboard.RESTING)
        if self._is_needed():
            self._watch()  # the other one has begun to rest in the same moment, trusting in us
            return False
        self._accepted = self._slot.accepted_everywhere
        self._look_at = time.monotonic() + REST_PAUSE
        if self._somebody_waits():
            self._slot.scoreboard.ring()  # the kernel may have woken nobody but us for that client
        return True

    # --- no room

    def _wait(self, why: str) -> None:
        """Leave new clients in the backlog until a connection ends, or for CAPACITY_PAUSE seconds."""
        now = time.monotonic()
        if not self._told_of_it and not self._slot.others_wait and now >= self._tell_at:
            self._told_of_it = True
            self._tell_at = now + TELL_PAUSE
            log.warning("not accepting", extra={"reason": why, "live": self._slot.live_everywhere})
        self._full = why
        self._someone_left = False
        self._look_at = now + CAPACITY_PAUSE
        self._unwatch(scoreboard.WAITING)
        if self._when_full == EVICT and self._somebody_waits():
            self._make_room()

    def _try_again(self) -> None:
        """There may be room again: for all that wait, or only for some of them."""
        why, self._full = self._full, None
        self._someone_left = False
        self._watch()
        for listener in list(self._by_fd.values()):
            self._accept_backlog(listener)
        if self._full is None and self._told_of_it:
            self._told_of_it = False
            log.info("accepting again", extra={"reason": why, "live": self._slot.live_everywhere})

    def one_has_ended(self) -> bool:
        """From the thread of a connection that has ended: True if this worker's main thread is to be woken."""
        if self._full is not None:
            self._someone_left = True
            return True
        if self._slot.others_wait:
            self._slot.scoreboard.ring()
        return False

    # --- the end

    def leave(self, names: Sequence[str] | None) -> None:
        """Have nothing to do with new clients any more, but for those of the listeners of these names (None: all)."""
        self._leaving = True
        self._full = self._look_at = None
        self._unwatch(scoreboard.ABSENT)
        self._epoll.unregister(self._slot.scoreboard.doorbell)
        self._slot.scoreboard.ring()  # others may rest because of this one
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
        if self._pair_reserved:
            self._pair_reserved = False
            self._threads.release(THREADS)
