"""The accept loop: one main thread, one epoll, and a pool of threads that do the relaying.

The main thread owns the listeners, the admission of connections and the clock; it never touches a byte of
anybody's traffic. In its epoll are the listeners, the wake-up, and the sockets that hangups.py watches.

A connection is admitted only if there is room for it under max-connections and both its threads are set aside.
Otherwise the listeners leave the epoll, and clients wait in the kernel's backlog until somebody leaves.
"""

import errno
import itertools
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from tproxy_relay import endpoint, listeners
from tproxy_relay.connection import THREADS, Connection, Context
from tproxy_relay.hangups import Hangups
from tproxy_relay.listeners import Listener
from tproxy_relay.policy import Destinations, RefusedError
from tproxy_relay.record import Outcome
from tproxy_relay.registry import Registry
from tproxy_relay.settings import Settings
from tproxy_relay.sockets import SEND_TICK, Tuning
from tproxy_relay.threads import RelayThreads
from tproxy_relay.wakeup import Wakeup

ACCEPT_BATCH = 64
"""Connections taken from one listener before the others, and the signals, get their turn."""
CAPACITY_PAUSE = 0.1
"""Seconds between two tries when descriptors, memory or threads have run out."""
TRIM_INTERVAL = 1.0
"""Seconds between two looks at threads that nobody needs any more."""
HANGUP_INTERVAL = 0.05
"""Seconds between two looks at a reset that must not overtake data."""
ABORT_GRACE = SEND_TICK + 0.5
"""Seconds that aborted connections get to end: a stuck send() notices within SEND_TICK."""

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


class Worker:
    """Accepts and relays until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        open_listeners: list[Listener],
        wakeup: Wakeup,
        *,
        tuning: Tuning,
        destinations: Destinations,
        max_connections: int,
    ) -> None:
        self._settings = settings
        self._listeners = open_listeners
        self._wakeup = wakeup
        self._max_connections = max_connections
        self._epoll = select.epoll()
        self._registry: Registry[Connection] = Registry()
        self._threads = RelayThreads(THREADS * max_connections)
        self._hangups = Hangups(self._epoll)
        self._context = Context(
            settings, tuning, destinations, self._registry, self._threads, self._hangups, self._one_has_ended
        )
        self._numbers = itertools.count(1)
        self._prefix = f"{os.getpid():x}-{int(time.time()):x}"
        self._by_fd: dict[int, Listener] = {}
        self._pair_reserved = False
        self._full: str | None = None
        self._retry_at = self._sweep_at = self._trim_at = 0.0
        self._undecided = False
        self._someone_left = False
        self._draining = False
        self._at_once = False

    def run(self, stopping: Callable[[], float]) -> None:
        """Until TERM (drain) or INT (at once), when `stopping` is called; then everything is closed and every
        connection recorded. `stopping` returns the seconds for which clients may still come that were intercepted
        before it. Raises OSError if a listener breaks."""
        self._epoll.register(self._wakeup.fileno(), select.EPOLLIN)
        self._watch_listeners()
        try:
            while not self._step():
                continue
            self._serve_latecomers(stopping())
            self._drain()
        except BaseException:
            self._abort_all(Outcome.ABORTED)
            raise
        finally:
            self._close()

    def _step(self) -> bool:
        """One turn of the loop. True if it is time to stop."""
        self._turn(self._patience())
        return self._obey_signals()

    def _turn(self, patience: float | None) -> None:
        """Whatever happens within so many seconds."""
        for fd, _events in self._epoll.poll(patience):
            if fd in self._by_fd:
                self._accept_from(self._by_fd[fd])
            elif fd != self._wakeup.fileno():
                self._hangups.fired(fd)
        self._keep_time()

    def _patience(self) -> float | None:
        """Seconds until the clock has something to do; None if nothing is due."""
        due = []
        if self._paused:
            due.append(self._retry_at)
        if self._sweep_interval and len(self._registry):
            due.append(self._sweep_at)
        if self._trim_at:
            due.append(self._trim_at)
        now = time.monotonic()
        if self._undecided:
            due.append(now + HANGUP_INTERVAL)
        return max(0.0, min(due) - now) if due else None

    # --- accepting

    def _watch_listeners(self) -> None:
        for listener in self._listeners:
            self._by_fd[listener.sock.fileno()] = listener
            self._epoll.register(listener.sock.fileno(), select.EPOLLIN)

    def _unwatch_listeners(self) -> None:
        for fd in self._by_fd:
            self._epoll.unregister(fd)
        self._by_fd.clear()

    def _accept_from(self, listener: Listener) -> bool:
        """Take a batch of clients in. True if more may be waiting, and there is room for them."""
        for _ in range(ACCEPT_BATCH):
            if not self._has_room():
                return False
            try:
                sock, sockaddr = listener.sock.accept()
            except BlockingIOError:
                return False  # the backlog is empty, or somebody else was quicker
            except OSError as error:
                if error.errno in _ABOUT_CAPACITY:
                    self._pause(os.strerror(error.errno))
                    return False
                if error.errno not in _ABOUT_THAT_CONNECTION:
                    raise
                continue
            self._admit(sock, endpoint.from_sockaddr(sockaddr), listener)
        return True

    def _has_room(self) -> bool:
        """True with two threads set aside; otherwise the listeners have left the epoll."""
        if len(self._registry) >= self._max_connections:
            self._pause("max-connections")
        elif self._pair_reserved or self._threads.reserve(THREADS):
            self._pair_reserved = True
            return True
        else:
            self._pause("no more threads")
        return False

    def _admit(self, sock: socket.socket, client: endpoint.Endpoint, listener: Listener) -> None:
        self._pair_reserved = False
        connection = Connection(f"{self._prefix}-{next(self._numbers):x}", sock, client, listener, self._context)
        cap = self._settings.max_per_source
        if self._registry.add(connection) > cap > 0:
            connection.refuse(RefusedError(Outcome.OVER_LIMIT, f"{client.host} has {cap} connections (max-per-source)"))
            return
        self._threads.run(connection.run)
        if not self._trim_at:
            self._trim_at = time.monotonic() + TRIM_INTERVAL

    def _pause(self, why: str) -> None:
        """Leave new clients in the backlog until a connection ends, or for CAPACITY_PAUSE seconds."""
        if self._full is None:
            log.warning("not accepting", extra={"reason": why, "live": len(self._registry)})
        self._full = why
        self._someone_left = False
        self._retry_at = time.monotonic() + CAPACITY_PAUSE
        self._unwatch_listeners()

    def _try_again(self) -> None:
        """There may be room again: for all that wait, or only for some of them."""
        if not self._has_room():
            return
        self._watch_listeners()
        for listener in list(self._by_fd.values()):
            self._accept_backlog(listener)
        if self._by_fd:
            log.info("accepting again", extra={"live": len(self._registry)})
            self._full = None

    @property
    def _paused(self) -> bool:
        """True while the listeners are to come back into the epoll."""
        return self._full is not None and not self._by_fd and not self._draining

    def _one_has_ended(self) -> None:
        """In the thread of the connection that ended."""
        if self._full or self._draining:
            self._someone_left = True
            self._wakeup.notify()

    # --- the clock

    @property
    def _sweep_interval(self) -> float:
        """Seconds between two looks for overdue connections: a twentieth of the shortest timeout."""
        timeouts = [t for t in (self._settings.idle_timeout, self._settings.half_close_timeout) if t]
        return min(1.0, max(0.05, min(timeouts) / 20)) if timeouts else 0.0

    def _keep_time(self) -> None:
        now = time.monotonic()
        self._undecided = self._hangups.settle()
        if self._paused and (self._someone_left or now >= self._retry_at):
            self._try_again()
        if self._sweep_interval and now >= self._sweep_at:
            self._sweep_at = now + self._sweep_interval
            self._abort_overdue(now)
        if self._trim_at and now >= self._trim_at:
            self._trim_at = now + TRIM_INTERVAL if self._threads.trim() or len(self._registry) else 0.0

    def _abort_overdue(self, now: float) -> None:
        for connection in self._registry.live():
            outcome = connection.overdue(now)
            if outcome:
                connection.abort(outcome)

    # --- signals and the end

    def _obey_signals(self) -> bool:
        """True if it is time to stop, or when draining, to stop at once."""
        stop = False
        for number in self._wakeup.signals():
            if number == signal.SIGUSR1:
                self._log_live()
            elif number == signal.SIGHUP:
                log.warning("settings are read at start only: restart to change them")
            else:
                self._at_once = self._at_once or number == signal.SIGINT or self._draining or stop
                stop = True
        return stop

    def _log_live(self) -> None:
        live = self._registry.live()
        for connection in live:
            log.info("connection live", extra=connection.snapshot())
        log.info("connections", extra=self._totals())

    def _totals(self) -> dict[str, object]:
        return {
            "accepted": self._registry.accepted_total,
            "live": len(self._registry),
            "closed": dict(self._registry.closed_by_outcome),
        }

    def _serve_latecomers(self, seconds: float) -> None:
        """Clients whose handshake was under way: without a listener its last packet would be answered by a reset."""
        deadline = time.monotonic() + seconds
        while not self._at_once and (left := deadline - time.monotonic()) > 0:
            patience = self._patience()
            self._turn(left if patience is None else min(left, patience))
            self._at_once = self._obey_signals() or self._at_once

    def _drain(self) -> None:
        """Serve what has come so far, for drain-timeout seconds at most."""
        self._draining = True
        if not self._at_once:
            for listener in list(self._by_fd.values()):
                self._accept_backlog(listener)
        self._unwatch_listeners()
        listeners.close_all(self._listeners)
        log.info("draining", extra={"live": len(self._registry), "drain_timeout": self._settings.drain_timeout})
        if not self._at_once:
            self._wait_for_the_last(self._settings.drain_timeout)
        self._abort_all(Outcome.ABORTED if self._at_once else Outcome.DRAINED)

    def _accept_backlog(self, listener: Listener) -> None:
        """The clients that the kernel has promised the connection to; not those that come for ever."""
        for _ in range(listeners.BACKLOG // ACCEPT_BATCH):
            if not self._by_fd or not self._accept_from(listener):
                return

    def _wait_for_the_last(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while len(self._registry) and time.monotonic() < deadline:
            patience = self._patience()
            left = max(0.0, deadline - time.monotonic())
            for fd, _events in self._epoll.poll(left if patience is None else min(left, patience)):
                if fd != self._wakeup.fileno():
                    self._hangups.fired(fd)
            self._keep_time()
            if self._obey_signals():
                return

    def _abort_all(self, outcome: Outcome) -> None:
        """Reset what is left. A connection whose threads are stuck is reset by the kernel when we exit."""
        deadline = time.monotonic() + ABORT_GRACE
        while (live := self._registry.live()) and time.monotonic() < deadline:
            for connection in live:
                connection.abort(outcome)
            self._epoll.poll(0.1)
            self._wakeup.signals()
        for connection in self._registry.live():
            connection.abandon()

    def _close(self) -> None:
        listeners.close_all(self._listeners)
        if self._pair_reserved:
            self._threads.release(THREADS)
        self._threads.close()
        log.info("stopped", extra=self._totals())
        self._epoll.close()
