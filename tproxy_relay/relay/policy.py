"""Where may a connection go, and as whom? Answers only; what to do about them is connection.py's matter.

Two mistakes turn a transparent relay into a machine that eats itself, and both are caught here: somebody
connects to a listener directly (the original destination is then the relay), and the ruleset forgets to
exempt the relay's own connections (loops.py keeps the flows for that).
"""

import math
import time
from dataclasses import dataclass
from functools import cached_property

from tproxy_relay.net import sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import acl
from tproxy_relay.relay.acl import AccessList
from tproxy_relay.settings import Network, PortRange, Settings

FULL, ADDRESS, RELAY = "full", "address", "relay"
"""Whose address the server sees: the client's with its port, the client's, or our own."""

LIFETIME = 1.0
"""Seconds for which it is remembered whether an address is this host's."""
_REMEMBERED = 4096


class RefusedError(Exception):
    """This connection gets a reset; the outcome says why, the text says it to the operator."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


@dataclass(frozen=True)
class Policy:
    """Where connections may go, and where to send those that nothing intercepted."""

    own_ports: frozenset[int]
    """Of our listeners."""
    target: Endpoint | None
    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()
    served: tuple[PortRange, ...] = ()
    """Ports of servers on this host that may be connected to, for what came by the listener of this port:"""
    inbound_port: int = 0

    @classmethod
    def of_settings(cls, settings: Settings, own_ports: frozenset[int], target: Endpoint | None) -> "Policy":
        """The policy of a configuration, for a relay whose listeners have these ports, and with its target resolved."""
        return cls(own_ports, target, settings.allow, settings.deny, settings.intercept_inbound, settings.inbound_port)

    @cached_property
    def _access(self) -> AccessList:
        return AccessList(self.allow, self.deny)

    @cached_property
    def _local(self) -> "LocalAddresses":
        return LocalAddresses()

    def choose(self, orig_dst: Endpoint | None, listener_port: int) -> Endpoint:
        """Where a connection with this original destination goes that came by the listener of that port. Raises
        RefusedError with the outcome that it has instead."""
        if orig_dst is None or self._is_own(orig_dst, frozenset({listener_port})):
            if self.target is None:
                raise RefusedError(Outcome.NOT_INTERCEPTED, "connected to the listener itself; no target is set")
            if self._is_own(self.target, self.own_ports):
                raise RefusedError(Outcome.SELF_CALL, f"{self.target} is this relay")
            return self.target
        if self._is_own(orig_dst, self.own_ports):
            raise RefusedError(Outcome.SELF_CALL, f"{orig_dst} is this relay")
        self._permit(orig_dst, listener_port)
        return orig_dst

    def _permit(self, destination: Endpoint, listener_port: int) -> None:
        verdict = self._access.judge(destination.host, destination.port)
        if verdict.allowed is False:
            raise RefusedError(Outcome.DENIED, f"{destination} is in {verdict.why}")
        if verdict.allowed or not self._is_local(destination):
            return
        if listener_port != self.inbound_port or not any(ports.covers(destination.port) for ports in self.served):
            why = "is an address of this host, and neither allow nor intercept-inbound has it"
            raise RefusedError(Outcome.DENIED, f"{destination} {why}")

    def _is_local(self, destination: Endpoint) -> bool:
        carried = (Endpoint(str(form), destination.port) for form in acl.forms(destination.host)[1:])
        return destination in self._local or any(one in self._local for one in carried)

    def _is_own(self, endpoint: Endpoint, ports: frozenset[int]) -> bool:
        return endpoint.port in ports and endpoint in self._local


class LocalAddresses:
    """The addresses of this host, asked for at most once in LIFETIME seconds each."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[float, bool]] = {}

    def debug_state(self) -> dict[str, int]:
        """For tests: of how many addresses it is remembered whether they are this host's."""
        return {"known": len(self._known)}

    def __contains__(self, endpoint: Endpoint) -> bool:
        key, now = (endpoint.host, endpoint.scope_id), time.monotonic()
        asked_at, answer = self._known.get(key, (-math.inf, False))
        if now - asked_at > LIFETIME:
            answer = sockets.is_local_address(endpoint)
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = (now, answer)
        return answer


def sources(settings: Settings, client: Endpoint, destination: Endpoint) -> tuple[str, ...]:
    """Whose address to try towards this destination, best first.

    A client on this host is never imitated: its address is taken. Nor is one whose address means something on one link
    only (fe80::1%eth0): it would tie our socket to that link. Nor is its port towards a server on this host: two
    sockets would have the same four numbers. Nor a port that is intercepted itself: the ruleset could not tell the
    client's packets from the server's, which takes a connection tracking zone (intercept/nft.py).
    """
    if settings.preserve_source == "no" or client.family != destination.family:
        return (RELAY,)
    if client.scope_id or sockets.is_local_address(client):
        return (RELAY,)
    ambiguous = any(ports.covers(client.port) for ports in settings.intercept_inbound)
    if settings.preserve_source == FULL and not ambiguous and not sockets.is_local_address(destination):
        return (FULL, ADDRESS)
    return (ADDRESS,)
