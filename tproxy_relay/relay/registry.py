"""Which connections are live, how many each client has, and whether one of them is the relay itself.

The connections are those of this worker; what the other workers must know of them is in the shared memory of
scoreboard.py. One lock, held for a few dictionary operations; nothing here blocks or closes anything.
"""

import threading
import time
from collections import Counter
from typing import Generic, NamedTuple, Protocol, TypeVar

from tproxy_relay.ipc.slot import SharedCounters, Slot
from tproxy_relay.net.endpoint import Endpoint


class Flow(NamedTuple):
    """The four numbers of one TCP connection, in the direction in which it was opened."""

    source: Endpoint
    destination: Endpoint

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}"


class ConnectionTraffic(NamedTuple):
    """Of one connection, and what has been told of it."""

    up: int
    """Bytes passed to the server."""
    down: int
    """Bytes passed to the client."""
    up_rate: float
    """Bytes a second, between the last two looks."""
    down_rate: float


NOTHING_CARRIED = ConnectionTraffic(0, 0, 0.0, 0.0)


class Member(Protocol):
    """What the registry needs to know of a connection."""

    @property
    def id(self) -> str:
        """Unique in this process."""

    @property
    def client(self) -> Endpoint:
        """Who connected."""

    @property
    def flows(self) -> list[Flow]:
        """The flows it has noted here."""

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
    """The live connections of this worker, in its slot beside the others."""

    def __init__(self, slot: Slot, *, share_sources: bool = False) -> None:
        """`share_sources`: let the other workers know how many connections each client has here."""
        self._slot = slot
        self._share_sources = share_sources
        self._lock = threading.Lock()
        self._live: dict[str, M] = {}
        self._per_source: Counter[str] = Counter()
        self._accepted: dict[Flow, _Noted] = {}
        self._opened: dict[Flow, _Noted] = {}

    def __len__(self) -> int:
        return len(self._live)

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
            self._look_at(connection, 0.0)
            self._slot.went(outcome)
            self._slot.lasted(time.monotonic() - connection.born_at)
            host = connection.client.host
            if self._share_sources:
                self._slot.sources.remove(self._slot.scoreboard.digest(host))
            self._per_source[host] -= 1
            if not self._per_source[host]:
                del self._per_source[host]
            for flows, shared in (
                (self._accepted, self._slot.accepted_flows),
                (self._opened, self._slot.opened_flows),
            ):
                for flow in connection.flows:
                    noted = flows.get(flow)
                    if noted is not None and noted.connection == connection.id:
                        del flows[flow]
                        shared.remove(noted.key)

    def connected(self, seconds: float) -> None:
        """One of them has reached its server, and that took so long."""
        with self._lock:
            self._slot.connected(seconds)

    def look(self, seconds: float) -> None:
        """Count what all of them have moved since the last look, so many seconds ago."""
        for connection in self.live():
            with self._lock:
                if connection.id in self._live:
                    self._look_at(connection, seconds)

    def _look_at(self, connection: M, seconds: float) -> None:
        (up, down), before = connection.moved, connection.traffic
        if (up, down) == before[:2]:
            if before.up_rate or before.down_rate:
                connection.traffic = ConnectionTraffic(up, down, 0.0, 0.0)
            return
        more_up, more_down = up - before.up, down - before.down
        self._slot.carried(more_up, more_down)
        if seconds:
            connection.traffic = ConnectionTraffic(up, down, more_up / seconds, more_down / seconds)

    def is_loop_accepted(self, connection: M, flow: Flow) -> bool:
        """Note what was accepted. True if another connection of this relay opened this very flow.

        Both sides of a loop are asked, because the accepting side may be quicker than the opening one, which
        learns its own port only from connect(). Whoever comes second sees it.
        """
        with self._lock:
            key = self._note(self._accepted, self._slot.accepted_flows, flow, connection)
            return _is_anothers(self._opened.get(flow), connection) or self._slot.opened_flows.elsewhere(key) > 0

    def is_loop_opened(self, connection: M, flow: Flow) -> bool:
        """Note what was opened towards a server. True if another connection of this relay was accepted from it."""
        with self._lock:
            key = self._note(self._opened, self._slot.opened_flows, flow, connection)
            return _is_anothers(self._accepted.get(flow), connection) or self._slot.accepted_flows.elsewhere(key) > 0

    def _note(self, flows: "dict[Flow, _Noted]", shared: SharedCounters, flow: Flow, connection: M) -> bytes:
        before = flows.get(flow)
        key = self._slot.scoreboard.digest(str(flow)) if before is None else before.key
        if before is None:
            shared.add(key)
        flows[flow] = _Noted(connection.id, key)
        return key


class _Noted(NamedTuple):
    """Of one flow."""

    connection: str
    """The id of the one that noted it last."""
    key: bytes
    """In the tables that all workers see."""


def _is_anothers(noted: _Noted | None, connection: Member) -> bool:
    return noted is not None and noted.connection != connection.id
