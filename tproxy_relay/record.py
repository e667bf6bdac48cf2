"""How a connection ended, and the one record that is made of it.

The record is built once, when the connection is over; the access line and the counters are both made
from it. The names here are the vocabulary of the log, the counters and the documents.
"""

import enum
from typing import NamedTuple

from tproxy_relay.endpoint import Endpoint
from tproxy_relay.linux import TcpInfo


class Outcome(str, enum.Enum):
    """One word for each connection that was accepted."""

    COMPLETED = "completed"
    """Both sides sent a FIN and all bytes before it were passed on."""
    CLIENT_RESET = "client-reset"
    """The client's side broke off: a reset, or no answer within the keepalive or user timeout."""
    UPSTREAM_RESET = "upstream-reset"
    """The server's side broke off, likewise."""
    CONNECT_REFUSED = "connect-refused"
    CONNECT_TIMEOUT = "connect-timeout"
    CONNECT_UNREACHABLE = "connect-unreachable"
    NO_LOCAL_PORT = "no-local-port"
    """Every local port towards this destination is in use."""
    SELF_CALL = "self-call"
    """The destination was one of our own listeners."""
    NOT_INTERCEPTED = "not-intercepted"
    """Somebody connected to the listener itself, and there is no target for such connections."""
    DENIED = "denied"
    """The destination is not allowed."""
    LOOP = "loop"
    """The client was one of our own upstream sockets: the ruleset intercepts the relay itself."""
    OVER_LIMIT = "over-limit"
    """A cap, or descriptors, memory or threads, ran out."""
    EVICTED = "evicted"
    """It rested when room was needed."""
    IDLE = "idle"
    HALF_CLOSE_TIMEOUT = "half-close-timeout"
    DRAINED = "drained"
    """Still open when the drain timeout ended."""
    ABORTED = "aborted"
    """The relay was told to stop at once."""
    INTERNAL_ERROR = "internal-error"
    """A bug: the log has the traceback."""

    __str__ = str.__str__

    @property
    def ordinary(self) -> bool:
        """True for the ways in which TCP connections end when the relay has nothing to complain of."""
        return self in _ORDINARY


_ORDINARY = frozenset(
    {
        Outcome.COMPLETED,
        Outcome.CLIENT_RESET,
        Outcome.UPSTREAM_RESET,
        Outcome.EVICTED,
        Outcome.IDLE,
        Outcome.HALF_CLOSE_TIMEOUT,
        Outcome.DRAINED,
        Outcome.ABORTED,
    }
)


class ConnectionRecord(NamedTuple):
    """Everything that is said of a connection when it is over."""

    id: str
    listener: str
    client: Endpoint
    orig_dst: Endpoint | None
    """What the kernel said; the listener's own address, or None, if it was never intercepted."""
    destination: Endpoint | None
    """Where the relay connected to: orig_dst, or the target. None if it was refused before that was known."""
    upstream_local: Endpoint | None
    """Our address towards the server; None if we never got that far."""
    source: str | None
    """Whose address the server saw, or would have seen: `relay`, `address` (the client's), `full` (the client's, port
    and all). None if nothing was dialled."""
    outcome: Outcome
    error: str | None
    bytes_up: int
    """Bytes passed to the server's side."""
    bytes_down: int
    """Bytes passed to the client's side."""
    seconds: float
    """From accept to close."""
    connect_seconds: float | None
    """How long the upstream connect took."""
    client_tcp: TcpInfo | None
    upstream_tcp: TcpInfo | None

    def as_fields(self) -> dict[str, object]:
        """The fields of the access line; facts that there are none of are left out."""
        fields: dict[str, object] = {"id": self.id, "listener": self.listener, "client": str(self.client)}
        if self.orig_dst is not None:
            fields["orig_dst"] = str(self.orig_dst)
        if self.destination is not None and self.destination != self.orig_dst:
            fields["destination"] = str(self.destination)
        if self.upstream_local is not None:
            fields["upstream_local"] = str(self.upstream_local)
        if self.source is not None:
            fields["source"] = self.source
        fields["outcome"] = self.outcome.value
        if self.error is not None:
            fields["error"] = self.error
        fields["bytes_up"] = self.bytes_up
        fields["bytes_down"] = self.bytes_down
        fields["seconds"] = round(self.seconds, 6)
        if self.connect_seconds is not None:
            fields["connect_seconds"] = round(self.connect_seconds, 6)
        for side, info in (("client", self.client_tcp), ("upstream", self.upstream_tcp)):
            if info is not None:
                fields[side + "_rtt_ms"] = info.rtt_us / 1000
                fields[side + "_retransmits"] = info.retransmits
        return fields
