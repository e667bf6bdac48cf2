"""The one record that is made of a connection.

It is built once, when the connection is over; the access line and the counters are both made from it.
"""

from typing import NamedTuple

from tproxy_relay.net import probe_networks
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.linux import TcpInfo
from tproxy_relay.outcome import Outcome


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

    @property
    def of_self_probe(self) -> bool:
        """True for a connection by which the relay has tried itself, and which is nobody's."""
        return self.orig_dst is not None and probe_networks.has_both(self.client, self.orig_dst)

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
        if self.of_self_probe:
            fields["self_probe"] = True
        return fields
