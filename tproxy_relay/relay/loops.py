"""Is a connection the relay itself? A ruleset that forgets to exempt the relay's own connections brings them back.

Each connection notes the flow that was accepted and the one that was opened for it. A flow that is both, of two
different connections, has gone round. What the other workers must know of them is in the tables of the scoreboard.
"""

import threading
from collections.abc import Iterable
from typing import NamedTuple

from tproxy_relay.ipc.slot import SharedCounters, Slot
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.policy import RefusedError


class Flow(NamedTuple):
    """The four numbers of one TCP connection, in the direction in which it was opened."""

    source: Endpoint
    destination: Endpoint

    def __str__(self) -> str:
        return f"{self.source} -> {self.destination}"


class _Noted(NamedTuple):
    """What is remembered of one flow."""

    owner: str
    """The id of the connection that noted it last."""
    key: bytes
    """In the tables that all workers see."""


class Loops:
    """The flows of one worker's live connections. From any thread."""

    def __init__(self, slot: Slot, lock: threading.Lock) -> None:
        """`lock` is the registry's: a connection and its flows are forgotten together."""
        self._slot = slot
        self._lock = lock
        self._accepted: dict[Flow, _Noted] = {}
        self._opened: dict[Flow, _Noted] = {}

    def debug_state(self) -> dict[str, int]:
        """For tests: how many flows it remembers."""
        return {"flows": len(self._accepted) + len(self._opened)}

    def note_accepted(self, owner: str, flow: Flow) -> bool:
        """Note a flow that was accepted, for the connection with this id. True if another connection of this relay
        opened this very flow.

        Both sides of a loop are asked, because the accepting side may be quicker than the opening one, which
        learns its own port only from connect(). Whoever comes second sees it.
        """
        slot = self._slot
        with self._lock:
            key = self._note(self._accepted, slot.accepted_flows, flow, owner)
            return _is_anothers(self._opened.get(flow), owner) or slot.opened_flows.elsewhere(key) > 0

    def note_opened(self, owner: str, flow: Flow) -> bool:
        """Note a flow that was opened towards a server. True if another connection of this relay was accepted from
        it."""
        slot = self._slot
        with self._lock:
            key = self._note(self._opened, slot.opened_flows, flow, owner)
            return _is_anothers(self._accepted.get(flow), owner) or slot.accepted_flows.elsewhere(key) > 0

    def _note(self, flows: dict[Flow, _Noted], shared: SharedCounters, flow: Flow, owner: str) -> bytes:
        before = flows.get(flow)
        key = self._slot.scoreboard.digest(str(flow)) if before is None else before.key
        if before is None:
            shared.add(key)
        flows[flow] = _Noted(owner, key)
        return key

    def forget(self, owner: str, noted: Iterable[Flow]) -> None:
        """Of a connection that has ended: the flows that it was the last to note. With the lock held."""
        for flows, shared in (
            (self._accepted, self._slot.accepted_flows),
            (self._opened, self._slot.opened_flows),
        ):
            for flow in noted:
                found = flows.get(flow)
                if found is not None and found.owner == owner:
                    del flows[flow]
                    shared.remove(found.key)


def _is_anothers(noted: _Noted | None, owner: str) -> bool:
    return noted is not None and noted.owner != owner


def refusal(flow: Flow) -> RefusedError:
    """What becomes of a connection whose flow has gone round."""
    return RefusedError(
        Outcome.LOOP,
        f"the relay's own connection {flow.source} -> {flow.destination} was intercepted: the ruleset "
        "lacks the rule that lets packets with the relay's mark, or of its account, pass",
    )
