"""Which connections are live, how many each client has, and whether one of them is the relay itself.

The connections are those of this worker; what the other workers must know of them is in the shared memory of board.py.
One lock, held for a few dictionary operations; nothing here blocks or closes anything.
"""

import threading
from collections import Counter
from typing import Generic, NamedTuple, Protocol, TypeVar

from tproxy_relay.board import Place
from tproxy_relay.endpoint import Endpoint


class Flow(NamedTuple):
    """The four numbers of one TCP connection, in the direction in which it was opened."""

    source: Endpoint
    destination: Endpoint

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}"


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


M = TypeVar("M", bound=Member)


class Registry(Generic[M]):
    """The live connections of this worker, at its place among the others."""

    def __init__(self, place: Place, *, share_sources: bool = False) -> None:
        """`share_sources`: let the other workers know how many connections each client has here."""
        self._place = place
        self._share_sources = share_sources
        self._lock = threading.Lock()
        self._live: dict[str, M] = {}
        self._per_source: Counter[str] = Counter()
        self._accepted: dict[Flow, str] = {}
        self._opened: dict[Flow, str] = {}

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
            self._place.came()
            self._live[connection.id] = connection
            self._per_source[host] += 1
            if not self._share_sources:
                return self._per_source[host]
            self._place.sources.add(host)
            return self._per_source[host] + self._place.sources.elsewhere(host)

    def remove(self, connection: M, outcome: str) -> None:
        """Count it out; a second call for the same connection does nothing."""
        with self._lock:
            if self._live.pop(connection.id, None) is None:
                return
            self._place.went(outcome)
            host = connection.client.host
            if self._share_sources:
                self._place.sources.remove(host)
            self._per_source[host] -= 1
            if not self._per_source[host]:
                del self._per_source[host]
            for flows, shared in (
                (self._accepted, self._place.accepted_flows),
                (self._opened, self._place.opened_flows),
            ):
                for flow in connection.flows:
                    if flows.get(flow) == connection.id:
                        del flows[flow]
                        shared.remove(str(flow))

    def is_loop_accepted(self, connection: M, flow: Flow) -> bool:
        """Note what was accepted. True if another connection of this relay opened this very flow.

        Both sides of a loop are asked, because the accepting side may be quicker than the opening one, which
        learns its own port only from connect(). Whoever comes second sees it.
        """
        with self._lock:
            if self._accepted.get(flow) is None:
                self._place.accepted_flows.add(str(flow))
            self._accepted[flow] = connection.id
            here = self._opened.get(flow, connection.id) != connection.id
            return here or self._place.opened_flows.elsewhere(str(flow)) > 0

    def is_loop_opened(self, connection: M, flow: Flow) -> bool:
        """Note what was opened towards a server. True if another connection of this relay was accepted from it."""
        with self._lock:
            if self._opened.get(flow) is None:
                self._place.opened_flows.add(str(flow))
            self._opened[flow] = connection.id
            here = self._accepted.get(flow, connection.id) != connection.id
            return here or self._place.accepted_flows.elsewhere(str(flow)) > 0
