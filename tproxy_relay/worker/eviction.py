"""Room for a new connection where there is none: the one that has rested longest goes.

A worker evicts its own. The order is found for many at a time, for that takes a scan of every connection; one that has
moved a byte since then is passed over.
"""

import heapq
import time
from collections import deque

from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import snapshot
from tproxy_relay.relay.connection import Connection
from tproxy_relay.relay.registry import Registry

REST = 1.0
"""Seconds without a byte either way, after which a connection may be evicted: busy ones are worth more than new."""
AT_A_TIME = 64
"""Connections that one scan puts in order."""


class Eviction:
    """Of one worker's connections. Main thread only."""

    def __init__(self, registry: Registry[Connection]) -> None:
        self._registry = registry
        self._next: deque[tuple[float, Connection]] = deque()
        self._scanned_at = 0.0

    def make_room(self) -> bool:
        """Reset the connection that has rested longest; the room is there when it has ended. False if none has rested
        for REST seconds."""
        now = time.monotonic()
        if not self._next and now - self._scanned_at >= REST / AT_A_TIME:
            self._scan(now)
        while self._next:
            moved_at, connection = self._next.popleft()
            if snapshot.moved_at(connection) == moved_at and connection.abort(Outcome.EVICTED):
                return True
        return False

    def _scan(self, now: float) -> None:
        self._scanned_at = now
        resting = (
            (moved_at, one) for one in self._registry.live() if (moved_at := snapshot.moved_at(one)) <= now - REST
        )
        self._next.extend(heapq.nsmallest(AT_A_TIME, resting, key=lambda pair: pair[0]))
