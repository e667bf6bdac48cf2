"""Where may a connection go, and as whom? Answers only; what to do about them is connection.py's matter.

Two mistakes turn a transparent relay into a machine that eats itself, and both are caught here: somebody
connects to a listener directly (the original destination is then the relay), and the ruleset forgets to
exempt the relay's own connections (registry.py keeps the flows for that).
"""

from dataclasses import dataclass

from tproxy_relay import sockets
from tproxy_relay.endpoint import Endpoint
from tproxy_relay.record import Outcome
from tproxy_relay.settings import Settings

FULL, ADDRESS, RELAY = "full", "address", "relay"
"""Whose address the server sees: the client's with its port, the client's, or our own."""


class RefusedError(Exception):
    """This connection gets a reset; the outcome says why, the text says it to the operator."""

    def __init__(self, outcome: Outcome, why: str) -> None:
        super().__init__(why)
        self.outcome = outcome


@dataclass(frozen=True)
class Destinations:
    """Our own ports, and where to send connections that nothing intercepted."""

    own_ports: frozenset[int]
    target: Endpoint | None

    def choose(self, orig_dst: Endpoint | None, listener_port: int) -> Endpoint:
        """Where this connection goes, or RefusedError."""
        if orig_dst is None or self._is_own(orig_dst, frozenset({listener_port})):
            if self.target is None:
                raise RefusedError(Outcome.NOT_INTERCEPTED, "connected to the listener itself; no target is set")
            chosen = self.target
        else:
            chosen = orig_dst
        if self._is_own(chosen, self.own_ports):
            raise RefusedError(Outcome.SELF_CALL, f"{chosen} is this relay")
        return chosen

    @staticmethod
    def _is_own(endpoint: Endpoint, ports: frozenset[int]) -> bool:
        return endpoint.port in ports and sockets.is_local_address(endpoint)


def sources(settings: Settings, client: Endpoint, destination: Endpoint) -> tuple[str, ...]:
    """Whose address to try towards this destination, best first.

    A client on this host is never imitated: its address is taken. Nor is its port towards a server on this
    host: two sockets would have the same four numbers. Nor a port that is intercepted itself: the ruleset could not
    tell the client's packets from the server's, which takes a connection tracking zone (intercept/nft.py).
    """
    if settings.preserve_source == "no" or client.family != destination.family or sockets.is_local_address(client):
        return (RELAY,)
    ambiguous = any(ports.covers(client.port) for ports in settings.intercept_inbound)
    if settings.preserve_source == FULL and not ambiguous and not sockets.is_local_address(destination):
        return (FULL, ADDRESS)
    return (ADDRESS,)
