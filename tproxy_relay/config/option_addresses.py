"""What may be written for an address, a host, a network or an interface, and what it becomes.

Text is ASCII here too, and nothing is looked up: a name may mean another address tomorrow.
"""

import ipaddress
import re

from tproxy_relay.config import option_types
from tproxy_relay.config.option_types import BadValue, OptionType, shown
from tproxy_relay.settings import INTERFACE_NAME, HostPort, Network

MAX_SOCKET_PATH = 107
"""Bytes; unix(7): sun_path has 108, the final zero included."""

_HOST_PORT = re.compile(r"(?:\[(?P<ipv6>[^][]*)]|(?P<host>[^][:]*)):(?P<port>[^:]*)")
_NETWORK = re.compile(
    r"\[(?P<ipv6>[^][]*)](?::(?P<ports6>.*))?|(?P<bare>[^][:]*:[^][:]*:[^][]*)|(?P<ipv4>[^][:]*)(?::(?P<ports4>.*))?"
)
"""An IPv6 network is in brackets if ports follow."""
_PREFIXED = re.compile(r"[0-9A-Fa-f:.]+(/(0|[1-9][0-9]{0,2}))?")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
# inet_aton() takes '127.1' and '0x7f.1' for addresses, so a name must not end like one.
_ENDS_LIKE_AN_ADDRESS = re.compile(r"(.*\.)?([0-9]+|0[xX][0-9a-fA-F]*)")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """A unicast address without a scope: 'fe80::1%eth0' would say the interface a second time."""
    try:
        address = ipaddress.ip_address("" if "%" in text else text)
    except ValueError:
        raise BadValue(f"{shown(text)} is not a numeric IPv4 or IPv6 address") from None
    if address.is_multicast or text == "255.255.255.255":
        raise BadValue(f"{shown(text)} is not the address of one host")
    # A listener for IPv6 only cannot bind it (EINVAL), and an IPv4 one wants the other spelling.
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped:
        raise BadValue(f"{shown(text)} is an IPv4 address in disguise: write {mapped}")
    return address


def _addresses(text: str) -> tuple[str, ...]:
    addresses = [_address(item) for item in option_types.items_of(text)]
    option_types.refuse_twins(addresses, text)
    for wildcard in (address for address in addresses if address.is_unspecified):
        for other in addresses:
            # The kernel says EADDRINUSE to the second of the two.
            if other != wildcard and other.version == wildcard.version:
                raise BadValue(f"{other} is already part of {wildcard} in {shown(text)}: drop one of them")
    return tuple(map(str, addresses))


def _interface(text: str) -> str:
    if not INTERFACE_NAME.fullmatch(text) or text in (".", ".."):
        raise BadValue(f"{shown(text)} is not the name of a network interface")
    return text


def _host(text: str) -> str:
    """A host name or an IPv4 address. Nothing is looked up."""
    if _ENDS_LIKE_AN_ADDRESS.fullmatch(text):
        return str(_address(text))
    labels = text.removesuffix(".").split(".")
    if len(text) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise BadValue(f"{shown(text)} is not a host name or address")
    return text


def _target(text: str) -> HostPort:
    match = _HOST_PORT.fullmatch(text)
    if not match:
        raise BadValue(f"{shown(text)} is not HOST:PORT or [IPv6 address]:PORT")
    host = _host(match["host"]) if match["ipv6"] is None else str(_address(match["ipv6"]))
    if host in ("0.0.0.0", "::"):
        raise BadValue(f"{shown(text)}: {host} is every address of this host; name one")
    if host.startswith("fe80:"):
        raise BadValue(f"{shown(text)}: a link-local address cannot be reached without an interface")
    return HostPort(host, option_types.parse_port(match["port"]))


def _network(text: str) -> Network:
    match = _NETWORK.fullmatch(text)
    named = match and (match["ipv6"] if match["ipv6"] is not None else match["bare"] or match["ipv4"])
    if not match or not named or not _PREFIXED.fullmatch(named):
        raise BadValue(
            f"{shown(text)} is not a network, such as 10.0.0.0/8, 10.0.0.0/8:443 or [2001:db8::/32]:8000-8100"
        )
    try:
        network = ipaddress.ip_network(named, strict=False)
    except ValueError:
        raise BadValue(f"{shown(text)} is not an IPv4 or IPv6 network") from None
    if network.network_address != ipaddress.ip_address(named.partition("/")[0]):
        raise BadValue(f"{shown(text)}: an address has bits behind its prefix; write {network}")
    if getattr(network.network_address, "ipv4_mapped", None) and network.prefixlen >= 96:
        inner = ipaddress.ip_network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
        raise BadValue(f"{shown(text)} is an IPv4 network in disguise: write {inner}")
    ports = match["ports6"] if match["ports6"] is not None else match["ports4"]
    try:
        return Network(str(network), None if ports is None else option_types.parse_port_range(ports))
    except BadValue as error:
        raise BadValue(f"{error} in {shown(text)}") from None


def _networks(text: str) -> tuple[Network, ...]:
    if not text:
        return ()
    networks = tuple(map(_network, option_types.items_of(text)))
    option_types.refuse_twins(networks, text)
    return networks


def _admin(text: str) -> HostPort | str:
    if text.startswith("/"):
        path = option_types.parse_path(text)
        if len(path.encode()) > MAX_SOCKET_PATH or path.endswith("/"):
            raise BadValue(f"{shown(text)} cannot be the path of a unix socket: at most {MAX_SOCKET_PATH} bytes")
        return path
    where = _target(text)
    host = "127.0.0.1" if where.host.lower().removesuffix(".") == "localhost" else where.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise BadValue(f"{shown(text)} is not on the loopback interface, such as 127.0.0.1:{where.port}")
    return HostPort(host, where.port)


NETWORKS = OptionType(
    _networks,
    "networks or addresses, each with a port or a range of ports if not all are meant, such as 10.0.0.0/8, "
    f"192.0.2.1:443 or [2001:db8::/32]:8000-8100; up to {option_types.MAX_ITEMS} of them, with commas between",
)
ADDRESSES = OptionType(_addresses, "numeric IPv4 and IPv6 addresses, with commas between")
INTERFACE = OptionType(_interface, "the name of an interface, such as eth0")
TARGET = OptionType(_target, "HOST:PORT, or [IPv6 address]:PORT; a host name or an address")
ADMIN = OptionType(_admin, "a port of a loopback address, such as 127.0.0.1:9106, or the path of a unix socket")
