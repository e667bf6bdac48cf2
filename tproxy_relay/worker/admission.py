"""Is there room for one more client, and what becomes of it.

A connection is admitted only if there is room for it, and both its threads are set aside. Where there is none, the
option when-full says what happens: its client waits in the kernel's backlog until a connection has ended, or is reset,
or the connection that has rested longest goes.
"""

import itertools
import logging
import os
import socket
import time
from contextlib import AbstractContextManager

from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.relay.connection import THREADS, Connection, WorkerContext
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.system.limits import Limits
from tproxy_relay.worker.eviction import Eviction
from tproxy_relay.worker.rate_limit import RateLimit

REPORT_PAUSE = 60.0
"""Seconds from one line about a full relay to the next one."""
TRIM_INTERVAL = 1.0
"""Seconds between two trims of the threads that nobody needs any more."""

log = logging.getLogger(__name__)


class Admission:
    """The room of one worker, and who gets it. Main thread only."""

    def __init__(self, slot: Slot, limits: Limits, ends: EndNotifier, context: WorkerContext) -> None:
        self._slot = slot
        self._limits = limits
        self._ends = ends
        self._context = context
        self._threads = context.threads
        self._rate_limit = RateLimit(slot)
        self._eviction = Eviction(context.registry)
        self._pair_reserved = False
        self.full: str | None = None
        """What there was too little of for the client that waits; None: nobody waits, as far as it is known."""
        self._reported = False
        self._report_at = 0.0
        self._trim_at = 0.0
        self._numbers = itertools.count(1)
        self._prefix = f"{os.getpid():x}-{int(time.time()):x}"

    # --- room for one

    def lack(self) -> str | None:
        """What this worker has too little of for one more connection. None with two threads set aside, and descriptors
        left for a connection of theirs."""
        room = self._limits.room
        if self._slot.live >= room:
            return "descriptors" if room < self._limits.most else "max-connections"
        if not self._pair_reserved and not self._threads.reserve(THREADS):
            return "no more threads"
        self._pair_reserved = True
        return None

    def turn(self) -> AbstractContextManager[bool]:
        """Around the accept of one client and its `admit`. Gives False if the whole relay has no room for it."""
        return self._slot.admission(self._limits.most)

    @property
    def refuses(self) -> bool:
        """True if clients for whom there is no room are accepted and reset, by `refuse`."""
        return self._context.settings.when_full == "refuse"

    @property
    def evicts(self) -> bool:
        """True if there may be somebody to `evict` when a client waits."""
        return self._context.settings.when_full == "evict"

    # --- one client

    def admit(self, sock: socket.socket, client: Endpoint, listener: Listener) -> None:
        """Have a client served, after `lack` has found nothing; or reset it, if it has as many connections already as
        one source may have."""
        self._pair_reserved = False
        connection = self._connection(sock, client, listener)
        if why := self._count_in(connection):
            connection.refuse(why, THREADS)
            return
        self._threads.run(connection.run)
        if not self._trim_at:
            self._trim_at = time.monotonic() + TRIM_INTERVAL

    def refuse(self, sock: socket.socket, client: Endpoint, listener: Listener, lack: str) -> None:
        """Reset a client for which there is no room: there is too little of `lack`."""
        connection = self._connection(sock, client, listener)
        self._context.registry.add(connection)
        connection.refuse(f"no room: {lack} (when-full)")

    def _connection(self, sock: socket.socket, client: Endpoint, listener: Listener) -> Connection:
        return Connection(f"{self._prefix}-{next(self._numbers):x}", sock, client, listener, self._context)

    def _count_in(self, connection: Connection) -> str | None:
        """Why its client may not have it, if so."""
        settings, registry = self._context.settings, self._context.registry
        most, rate = settings.max_per_source, settings.max_rate_per_source
        if not most and not rate:
            registry.add(connection)
            return None
        host = connection.client.host
        # Two workers would otherwise each refuse, or admit, the last one under the cap.
        with self._slot.scoreboard.turn():
            count = registry.add(connection)
            if most and count > most:
                return f"{host} has {most} connections (max-per-source)"
            if rate and not self._rate_limit.admit(host, rate):
                return f"{host} has opened {rate} connections within a second (max-rate-per-source)"
        return None

    # --- no room

    def await_room(self, why: str) -> None:
        """Clients wait from now on, for want of `why`; connections that end wake the main thread."""
        now = time.monotonic()
        if not self._reported and not self._slot.others_wait and now >= self._report_at:
            self._reported = True
            self._report_at = now + REPORT_PAUSE
            log.warning("not accepting", extra={"reason": why, "live": self._slot.live_everywhere})
        self.full = why
        self._ends.await_room()

    @property
    def room_came(self) -> bool:
        """True if a connection has ended since clients wait."""
        return self._ends.room_came

    def evict(self) -> None:
        """Make room, if a connection has rested for long enough."""
        self._eviction.make_room()

    def retry(self) -> str | None:
        """Clients are to be taken again, as if there were room. Returns what they have waited for."""
        why, self.full = self.full, None
        self._ends.await_no_room()
        return why

    def report_room(self, why: str | None) -> None:
        """After a `retry`, of which nobody waits any more."""
        if self._reported:
            self._reported = False
            log.info("accepting again", extra={"reason": why, "live": self._slot.live_everywhere})

    # --- the threads

    @property
    def due(self) -> float | None:
        """When `trim` has something to do (time.monotonic()); None: not before another client has been admitted."""
        return self._trim_at or None

    def trim(self, now: float) -> None:
        """Let threads go that nobody needs any more, if it is time for that (time.monotonic())."""
        if self._trim_at and now >= self._trim_at:
            more = self._threads.trim() or len(self._context.registry)
            self._trim_at = now + TRIM_INTERVAL if more else 0.0

    def close(self) -> None:
        """Nobody is admitted any more: give the threads back that are set aside."""
        if self._pair_reserved:
            self._pair_reserved = False
            self._threads.release(THREADS)
