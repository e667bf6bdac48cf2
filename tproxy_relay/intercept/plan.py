"""What is to be intercepted: one frozen value, from which every rule and every route is made.

Three bits of the fwmark say what a packet is; all other bits belong to others and are never touched:

    IN      of an intercepted connection from outside; or an answer to a relay that borrowed a client's address
    OUT     of an intercepted connection of a program on this host; or such an answer from a server on this host
    RELAY   sent by the relay itself (SO_MARK): never intercepted
"""

import hashlib
import ipaddress
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

from tproxy_relay.settings import (
    INTERFACE_NAME,
    KERNEL_ROUTE_TABLES,
    MAX_ROUTE_PRIORITY,
    Mode,
    OnFailure,
    PortRange,
    PreserveSource,
    Settings,
)
from tproxy_relay.system import privileges

State = Literal["active", "draining", "closed"]
"""active: new connections are taken. draining: none are, and those that the relay has go on. closed: new ones
are refused; this stands in for a dead relay under `on-failure closed` where the active rules cannot do it."""

Family = Literal[4, 6]
IPV4: Family = 4
IPV6: Family = 6

NEVER: Mapping[Family, tuple[str, ...]] = {
    4: ("127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
    6: ("::1/128", "fe80::/10", "ff00::/8"),
}
"""Destinations that mean something on one host or link only (RFC 6890, RFC 4291)."""

CONNTRACK_ZONE = 7006
"""Of the server's side of connections that keep the client's port: both sides have the same four numbers."""


class Marks(NamedTuple):
    """The three bits, from the lowest up."""

    inbound: int
    outbound: int
    relay: int


@dataclass(frozen=True)
class Plan:
    """Which connections go to which listener, and how. ValueError if a value could not stand in a rule."""

    mode: Mode
    inbound: tuple[PortRange, ...]
    """Destination ports of connections that arrive from outside."""
    outbound: tuple[PortRange, ...]
    """Destination ports of connections of programs on this host."""
    inbound_port: int
    outbound_port: int
    listen: Mapping[Family, str]
    """Families that are intercepted, with the address that the listeners have there ('0.0.0.0', '127.0.0.1')."""
    interface: str | None
    """Only what arrives here is inbound; None: what arrives anywhere but on lo."""
    preserve_source: PreserveSource
    on_failure: OnFailure
    mark_mask: int
    route_table: int
    route_priority: int
    """Of the first of three rules of routing; the others follow it."""
    exempt_uid: int | None
    """Connections of this account are not outbound: for a relay that may not set marks."""
    beside_nat: bool = False
    """Somebody else rewrites destinations of what arrives: keep them off what is intercepted."""

    def __post_init__(self) -> None:
        for fault in self._faults():
            raise ValueError(f"{fault} cannot stand in a rule")

    def _faults(self) -> Iterator[str]:
        """The settings have been checked already (config/option_types.py); this is the last door before the kernel."""
        if not _is_whole(self.mark_mask, 1, 0xFFFFFFFF) or self.mark_mask.bit_count() != 3:
            yield f"mark mask {self.mark_mask!r}"
        if self.interface is not None and (
            not INTERFACE_NAME.fullmatch(self.interface) or self.interface in (".", "..")
        ):
            yield f"interface {self.interface!r}"
        for word, allowed in (
            (self.mode, get_args(Mode)),
            (self.on_failure, get_args(OnFailure)),
            (self.preserve_source, get_args(PreserveSource)),
        ):
            if word not in allowed:
                yield repr(word)
        for first, last in (*self.inbound, *self.outbound, *((one, one) for one in self._own_ports)):
            if not (_is_whole(first, 1, 65535) and _is_whole(last, first, 65535)):
                yield f"ports {first!r} to {last!r}"
        for family, address in self.listen.items():
            if "%" in address or ipaddress.ip_address(address).version != family:
                yield f"address {address!r}"
        if not _is_whole(self.route_table, 1, 0xFFFFFFFF) or self.route_table in KERNEL_ROUTE_TABLES:
            yield f"route table {self.route_table!r}"
        if not _is_whole(self.route_priority, 1, MAX_ROUTE_PRIORITY):
            yield f"route priority {self.route_priority!r}"
        if self.exempt_uid is not None and not _is_whole(self.exempt_uid, 0, 0xFFFFFFFE):
            yield f"account {self.exempt_uid!r}"

    @property
    def _own_ports(self) -> tuple[int, int]:
        return self.inbound_port, self.outbound_port

    @property
    def marks(self) -> Marks:
        """The bits IN, OUT and RELAY, which are those of the mark mask from the lowest up."""
        low, middle, high = (1 << bit for bit in range(32) if self.mark_mask >> bit & 1)
        return Marks(low, middle, high)

    @property
    def listener_ports(self) -> frozenset[int]:
        """The ports of the listeners that intercepted connections are sent to."""
        ports = [self.inbound_port] * bool(self.inbound) + [self.outbound_port] * bool(self.outbound)
        return frozenset(ports)

    @property
    def families(self) -> tuple[Family, ...]:
        """The families that are intercepted, 4 before 6."""
        return tuple(sorted(self.listen))

    @property
    def keeps_source(self) -> bool:
        """True if answers to a client's own address must find their way to the relay."""
        return self.preserve_source != "no"

    @property
    def imitates(self) -> bool:
        """True if the relay sends packets in the name of others over the network: errors about them go to those."""
        return bool(self.inbound and self.listen) and (self.mode == "tproxy" or self.keeps_source)

    @property
    def speaks_here(self) -> bool:
        """True if the relay speaks to programs on this host in the name of others, and must get their answers."""
        return bool(self.mode == "tproxy" and self.outbound) or bool(self.inbound and self.keeps_source)

    @property
    def needs_routing(self) -> bool:
        """False only where the kernel rewrites addresses and nobody borrows one."""
        return self.mode == "tproxy" or self.keeps_source

    def on_address(self, family: Family) -> str | None:
        """The listeners' address of that family; None for all of them."""
        address = self.listen[family]
        return None if ipaddress.ip_address(address).is_unspecified else address

    @property
    def digest(self) -> str:
        """Eight characters that change with anything in the plan."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


def of_settings(settings: Settings, *, beside_nat: bool = False) -> Plan:
    """The plan that these settings ask for, on this host. ConfigError if `user` is not an account."""
    return Plan(
        mode=settings.mode,
        inbound=settings.intercept_inbound,
        outbound=settings.intercept_outbound,
        inbound_port=settings.inbound_port,
        outbound_port=settings.outbound_port,
        listen=_listen(settings.bind),
        interface=settings.interface,
        preserve_source=settings.preserve_source,
        on_failure=settings.on_failure,
        mark_mask=settings.mark_mask,
        route_table=settings.route_table,
        route_priority=settings.route_priority,
        exempt_uid=None if settings.user is None else privileges.account(settings.user).uid,
        beside_nat=beside_nat and settings.mode == "tproxy" and bool(settings.intercept_inbound),
    )


def to_json(plan: Plan) -> str:
    """In one line, for the guard process."""
    return json.dumps(asdict(plan))


def from_json(text: str) -> Plan:
    """The other way; ValueError, KeyError or TypeError for anything else."""
    values = json.loads(text)
    values["inbound"] = tuple(PortRange(*ports) for ports in values["inbound"])
    values["outbound"] = tuple(PortRange(*ports) for ports in values["outbound"])
    values["listen"] = {IPV6 if family == "6" else IPV4: address for family, address in values["listen"].items()}
    return Plan(**values)


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _listen(bind: tuple[str, ...]) -> dict[Family, str]:
    """One address for each family: the wildcard or loopback if they are there, else the first one."""
    chosen: dict[Family, str] = {}
    for family in (IPV4, IPV6):
        addresses = [ipaddress.ip_address(text) for text in bind]
        mine = [address for address in addresses if address.version == family]
        mine.sort(key=lambda address: (not address.is_unspecified, not address.is_loopback))
        if mine and (family == IPV4 or _kernel_has_ipv6()):
            chosen[family] = str(mine[0])
    return chosen


def _kernel_has_ipv6() -> bool:
    """True unless it is not in the kernel, or was kept out at boot (ipv6.disable=1). Where it is off for now
    (net.ipv6.conf.all.disable_ipv6) it may come."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError:
        return False
    return True
