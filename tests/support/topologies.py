"""Where a relay can stand between client and server, and host settings that break the usual recipes."""

from dataclasses import dataclass

from tproxy_relay.lab import Host, Lab, Topology

HOSTILE = {
    "net.ipv4.conf.all.rp_filter": 1,
    "net.ipv4.conf.default.rp_filter": 1,
    "net.ipv4.conf.rc.rp_filter": 1,
    "net.ipv4.conf.rs.rp_filter": 1,
    "net.ipv4.conf.all.src_valid_mark": 1,
    "net.ipv4.tcp_fwmark_accept": 1,
    "net.ipv4.fwmark_reflect": 1,
    "net.ipv6.fwmark_reflect": 1,
}
"""Settings under which the usual recipes lose all traffic."""


@dataclass(frozen=True)
class Place:
    """Who connects to whom, and whose address the server can see when the source is preserved."""

    topology: Topology
    client: str
    server: str
    can_preserve: tuple[str, ...]
    """What `source` says for preserve-source `address` and `full`."""


PLACES = (
    Place("gateway", "client", "server", ("address", "full")),
    Place("host", "client", "relay", ("address", "address")),  # full: two sockets with the same four numbers
    Place("local", "relay", "server", ("relay", "relay")),  # a client on this host is never imitated
)


def ends(lab: Lab, place: Place) -> tuple[Host, Host]:
    """The hosts of its client and of its server."""
    return getattr(lab, place.client), getattr(lab, place.server)
