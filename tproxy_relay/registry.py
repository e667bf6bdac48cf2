"""Which connections are live, how many each client has, and whether one of them is the relay itself.

One lock, held for a few dictionary operations; nothing here blocks or closes anything.
"""

import threading
from collections import Counter
from typing import Generic, NamedTuple, Protocol, TypeVar

from tproxy_relay.endpoint import Endpoint


class Flow(NamedTuple):
    """The four numbers of one TCP connection, in the direction in which it was opened."""

    source: Endpoint
    destination: Endpoint


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
    """The live connections of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, M] = {}
        self._per_source: Counter[str] = Counter()
        self._accepted: dict[Flow, str] = {}
        self._opened: dict[Flow, str] = {}
        self.accepted_total = 0
        self.closed_by_outcome: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[M]:
        """The connections that are live now, oldest first."""
        with self._lock:
            return list(self._live.values())

    def add(self, connection: M) -> int:
        """Count an accepted connection in. Returns how many its client address has now."""
        with self._lock:
            self.accepted_total += 1
            self._live[connection.id] = connection
            self._per_source[connection.client.host] += 1
            return self._per_source[connection.client.host]

    def remove(self, connection: M, outcome: str) -> None:
        """Count it out; a second call for the same connection does nothing."""
        with self._lock:
            if self._live.pop(connection.id, None) is None:
                return
            self.closed_by_outcome[outcome] += 1
            self._per_source[connection.client.host] -= 1
            if not self._per_source[connection.client.host]:
                del self._per_source[connection.client.host]
            for flows in (self._accepted, self._opened):
                for flow in connection.flows:
                    if flows.get(flow) == connection.id:
                        del flows[flow]

    def is_loop_accepted(self, connection: M, flow: Flow) -> bool:
        """Note what was accepted. True if another connection of ours opened this very flow.

        Both sides of a loop are asked, because the accepting side may be quicker than the opening one, which
        learns its own port only from connect(). Whoever comes second sees it.
        """
        with self._lock:
            self._accepted[flow] = connection.id
            return self._opened.get(flow, connection.id) != connection.id

    def is_loop_opened(self, connection: M, flow: Flow) -> bool:
        """Note what was opened towards a server. True if another connection of ours was accepted from it."""
        with self._lock:
            self._opened[flow] = connection.id
            return self._accepted.get(flow, connection.id) != connection.id
