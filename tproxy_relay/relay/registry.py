"""Which connections are live, how many each client has, and what they have carried.

The connections are those of this worker; what the other workers must know of them is in the shared memory of
scoreboard.py. One lock, held for a few dictionary operations; nothing here blocks or closes anything.
"""

import threading
import time
from collections import Counter, deque
from typing import Generic, NamedTuple, Protocol, TypeVar

from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.relay.loops import Flow, Loops


class ConnectionTraffic(NamedTuple):
    """What one connection had carried when it was sampled last."""

    up: int
    """Bytes passed to the server."""
    down: int
    """Bytes passed to the client."""
    up_rate: float
    """Bytes a second, between the last two samples."""
    down_rate: float


NOTHING_CARRIED = ConnectionTraffic(0, 0, 0.0, 0.0)


class Member(Protocol):
    """What the registry needs to know of a connection."""

    @property
    def id(self) -> str:
        """A text that no other live connection of this process has."""

    @property
    def client(self) -> Endpoint:
        """The address that it was accepted from."""

    @property
    def flows(self) -> list[Flow]:
        """The flows that it has noted in `Registry.loops`."""

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed to the server, and to the client, so far."""

    @property
    def born_at(self) -> float:
        """When it was accepted (time.monotonic())."""

    traffic: ConnectionTraffic
    """As the registry saw it last."""


M = TypeVar("M", bound=Member)


class Registry(Generic[M]):
    """The live connections of this worker, counted in its slot beside the others. From any thread."""

    def __init__(self, slot: Slot, ends: EndNotifier, *, share_sources: bool = False, max_refused: int = 0) -> None:
        """`share_sources`: let the other workers know how many connections each client has here. `max_refused`: so many
        records are kept in `refused`."""
        self._slot = slot
        self._ends = ends
        self._share_sources = share_sources
        self._lock = threading.Lock()
        self._live: dict[str, M] = {}
        self._per_source: Counter[str] = Counter()
        self.loops = Loops(slot, self._lock)
        self.refused: deque[dict[str, object]] = deque(maxlen=max_refused)
        """The last records of connections that did not end as TCP connections do, as fields of their access lines."""

    def __len__(self) -> int:
        return len(self._live)

    def debug_state(self) -> dict[str, object]:
        """For tests: of how many sources it remembers something."""
        return {"sources": len(self._per_source)}

    def live(self) -> list[M]:
        """The connections that are live now, oldest first."""
        with self._lock:
            return list(self._live.values())

    def add(self, connection: M) -> int:
        """Count an accepted connection in. Returns how many its client address has now: in the whole relay, if the
        workers share that, or with this one."""
        host = connection.client.host
        with self._lock:
            self._slot.came()
            self._live[connection.id] = connection
            self._per_source[host] += 1
            if not self._share_sources:
                return self._per_source[host]
            key = self._slot.scoreboard.digest(host)
            self._slot.sources.add(key)
            return self._per_source[host] + self._slot.sources.elsewhere(key)

    def remove(self, connection: M, outcome: str) -> None:
        """Count it out; a second call for the same connection does nothing."""
        with self._lock:
            if self._live.pop(connection.id, None) is None:
                return
            self._sample(connection, 0.0)
            self._slot.went(outcome)
            self._slot.lasted(time.monotonic() - connection.born_at)
            host = connection.client.host
            if self._share_sources:
                self._slot.sources.remove(self._slot.scoreboard.digest(host))
            self._per_source[host] -= 1
            if not self._per_source[host]:
                del self._per_source[host]
            self.loops.forget(connection.id, connection.flows)

    def notify_end(self) -> None:
        """Wake whoever waits for a connection to end: one was counted out, and has given everything back."""
        self._ends.notify()

    def connected(self, seconds: float) -> None:
        """One of them has reached its server, which took so many seconds."""
        with self._lock:
            self._slot.connected(seconds)

    def sample(self, seconds: float) -> None:
        """Count what all of them have moved since the last sample, so many seconds ago."""
        for connection in self.live():
            with self._lock:
                if connection.id in self._live:
                    self._sample(connection, seconds)

    def _sample(self, connection: M, seconds: float) -> None:
        (up, down), before = connection.moved, connection.traffic
        if (up, down) == before[:2]:
            if before.up_rate or before.down_rate:
                connection.traffic = ConnectionTraffic(up, down, 0.0, 0.0)
            return
        more_up, more_down = up - before.up, down - before.down
        self._slot.carried(more_up, more_down)
        if seconds:
            connection.traffic = ConnectionTraffic(up, down, more_up / seconds, more_down / seconds)
