"""What may be written for a setting, and what it becomes.

A ``Kind`` turns text into a value or raises ``BadValue`` with the reason in the user's words, and says in
``allowed`` what it takes. It knows neither options nor where the text stood. Text is ASCII wherever the
kernel or the resolver reads it: int() and str.isdigit() would also take '٣', '1_000' and '+5'.
"""

import argparse
import ipaddress
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tproxy_relay import session_query
from tproxy_relay.errors import UsageError
from tproxy_relay.settings import INTERFACE_NAME, KERNEL_ROUTE_TABLES, HostPort, Network, PortRange

# poll(2), TCP_USER_TIMEOUT and the like take milliseconds in a C int: a little under 25 days.
MAX_SECONDS = 2147483
MIN_SECONDS = 0.001
# Linux refuses a larger TCP_KEEPIDLE (MAX_TCP_KEEPIDLE in include/net/tcp.h).
MAX_PACING = 0xFFFFFFFE
"""Bytes a second: 34 Gbit/s. One more means no limit to older kernels."""
MIN_BUFFER, MAX_BUFFER = 4096, 1 << 30
"""Bytes; the kernel doubles it, and takes an int (socket(7))."""
MAX_KEEPALIVE = 32767
MAX_WORKERS = 64
MAX_CONNECTIONS = 1_000_000
MAX_ITEMS = 64
# rtnetlink(7): a table's number has 32 bits.
MAX_ROUTE_TABLE = 0xFFFFFFFF
# PATH_MAX in linux/limits.h, less the NUL at the end.
MAX_PATH = 4095

# unix(7): sun_path has 108 bytes, the final zero included.
MAX_SOCKET_PATH = 107

_BLANKS = " \t"
_WHOLE = re.compile(r"0|[1-9][0-9]*")
_SECONDS = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_MASK = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[1-9][0-9]{0,9}")
_CONGESTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,14}")
"""linux/net/tcp.h: TCP_CA_NAME_MAX is 16 with the final zero."""
_ACCOUNT = re.compile(r"0|[1-9][0-9]{0,9}|[A-Za-z_][A-Za-z0-9_.-]{0,31}")
_HOST_PORT = re.compile(r"(?:\[(?P<ipv6>[^][]*)]|(?P<host>[^][:]*)):(?P<port>[^:]*)")
_NETWORK = re.compile(
    r"\[(?P<ipv6>[^][]*)](?::(?P<ports6>.*))?|(?P<bare>[^][:]*:[^][:]*:[^][]*)|(?P<ipv4>[^][:]*)(?::(?P<ports4>.*))?"
)
"""An IPv6 network is in brackets if ports follow."""
_PREFIXED = re.compile(r"[0-9A-Fa-f:.]+(/(0|[1-9][0-9]{0,2}))?")
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
# inet_aton() takes '127.1' and '0x7f.1' for addresses, so a name must not end like one.
_ENDS_LIKE_AN_ADDRESS = re.compile(r"(.*\.)?([0-9]+|0[xX][0-9a-fA-F]*)")


class BadValue(argparse.ArgumentTypeError):
    """The text is not a value of its kind. ``str()`` of it is the reason."""


@dataclass(frozen=True)
class Kind:
    """How to read a value, how to write it, and what is allowed."""

    parse: Callable[[str], object]
    allowed: str
    write: Callable[[object], str] = lambda value: text_of(value)
    words: tuple[str, ...] = ()
    """What can be written out, where it is one of a few words."""


def shown(text: str) -> str:
    """The text in quotes, on one line and not too long, for a message."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def text_of(value: object) -> str:
    """The value as the user would have written it; '' for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple) and not isinstance(value, HostPort):
        return ",".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def words(*allowed: str) -> Kind:
    """One of a few words, in capitals or not: LOG_LEVEL is often INFO."""

    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise BadValue(f"{shown(text)} is not one of {', '.join(allowed)}")
        return text.lower()

    return Kind(parse, " | ".join(allowed), words=allowed)


def whole(least: int, most: int, note: str = "") -> Kind:
    """A whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        # Ten digits are past every limit here, and int() refuses thousands of them.
        if not _WHOLE.fullmatch(text) or len(text) > 10 or not least <= int(text) <= most:
            raise BadValue(f"{shown(text)} is not a whole number from {least} to {most}")
        return int(text)

    return Kind(parse, f"{least} to {most}{note}")


def buffer() -> Kind:
    """Bytes of a socket's buffer, or 0."""
    some = whole(MIN_BUFFER, MAX_BUFFER)
    return Kind(lambda text: 0 if text == "0" else some.parse(text), f"0, or {some.allowed}")


def connections() -> Kind:
    """A cap on connections, or ``auto``, which is None."""
    return _or_auto(whole(1, MAX_CONNECTIONS))


def workers() -> Kind:
    """A number of processes, or ``auto``, which is None."""
    return _or_auto(whole(1, MAX_WORKERS))


def _or_auto(number: Kind) -> Kind:
    def parse(text: str) -> object:
        return None if text == "auto" else number.parse(text)

    return Kind(parse, f"auto, or {number.allowed}", lambda value: text_of(value) or "auto", ("auto",))


def seconds(zero: str | None) -> Kind:
    """A duration. ``zero`` says what 0 means; with None it is refused."""

    def parse(text: str) -> float:
        if not _SECONDS.fullmatch(text):
            raise BadValue(f"{shown(text)} is not a number of seconds")
        value = float(text)
        if value > MAX_SECONDS:
            raise BadValue(f"{shown(text)} is too long: at most {MAX_SECONDS} seconds")
        if value < MIN_SECONDS and (value or zero is None):
            raise BadValue(f"{shown(text)} is too short: at least {MIN_SECONDS} seconds")
        return value

    note = "" if zero is None else f"; 0: {zero}"
    return Kind(parse, f"seconds, {MIN_SECONDS} to {MAX_SECONDS}{note}")


def _items(text: str) -> list[str]:
    """What stands between the commas; blanks round a comma do not matter."""
    items = [item.strip(_BLANKS) for item in text.split(",")]
    if "" in items:
        raise BadValue(f"an item is empty in {shown(text)}" if text else "no value given")
    if len(items) > MAX_ITEMS:
        raise BadValue(f"{len(items)} items are too many: at most {MAX_ITEMS}")
    return items


def _no_twins(values: Iterable[object], text: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise BadValue(f"{value} is there twice in {shown(text)}")
        seen.add(value)


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise BadValue(f"{shown(text)} is not a TCP port (1-65535)")
    return int(text)


def _ports(text: str) -> tuple[int, ...]:
    items = _items(text)
    try:
        ports = tuple(map(_port, items))
    except BadValue as error:
        raise BadValue(f"{error} in {shown(text)}" if len(items) > 1 else str(error)) from None
    _no_twins(ports, text)
    return ports


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
    addresses = [_address(item) for item in _items(text)]
    _no_twins(addresses, text)
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
    return HostPort(host, _port(match["port"]))


def _mask(text: str) -> int:
    value = int(text, 0) if _MASK.fullmatch(text) else 0
    if value.bit_count() != 3 or value > 0xFFFFFFFF:
        raise BadValue(f"{shown(text)} is not a 32-bit mask with exactly three bits set, such as 0x07000000")
    return value


def _path(text: str) -> str:
    # A log line or a printed config must stay one line whatever the file is called.
    if not text.isprintable():
        raise BadValue(f"{shown(text)} has characters that cannot be printed")
    if text in ("", "--") or len(text) > MAX_PATH:
        raise BadValue(f"{shown(text)} is not the name of a file")
    return text


def _port_ranges(text: str) -> tuple[PortRange, ...]:
    """Ports and ranges of them, smallest first; two that overlap are one slip of the keyboard."""
    ranges = []
    for item in _items(text):
        first, dash, last = item.partition("-")
        try:
            one = PortRange(_port(first.strip(_BLANKS)), _port((last if dash else first).strip(_BLANKS)))
        except BadValue as error:
            raise BadValue(f"{error} in {shown(text)}" if item != text else str(error)) from None
        if one.first > one.last:
            raise BadValue(f"{item} runs backwards in {shown(text)}: write {one.last}-{one.first}")
        ranges.append(one)
    ranges.sort()
    for before, after in itertools.pairwise(ranges):
        if after.first <= before.last:
            raise BadValue(f"{before} and {after} overlap in {shown(text)}")
    return tuple(ranges)


def _port_range(text: str) -> PortRange:
    first, dash, last = text.partition("-")
    ports = PortRange(_port(first), _port(last if dash else first))
    if ports.first > ports.last:
        raise BadValue(f"{text} runs backwards: write {ports.last}-{ports.first}")
    return ports


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
        return Network(str(network), None if ports is None else _port_range(ports))
    except BadValue as error:
        raise BadValue(f"{error} in {shown(text)}") from None


def _networks(text: str) -> tuple[Network, ...]:
    if not text:
        return ()
    networks = tuple(map(_network, _items(text)))
    _no_twins(networks, text)
    return networks


def _admin(text: str) -> HostPort | str:
    if text.startswith("/"):
        path = _path(text)
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


def _show(text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for item in _items(text) if text else []:
        name, equals, value = item.partition("=")
        if not equals:
            raise BadValue(
                f"{shown(item)} is not NAME=VALUE, such as port=443; names: {', '.join(session_query.NAMES)}"
            )
        pairs.append((name.strip(_BLANKS), value.strip(_BLANKS)))
    _no_twins((name for name, _ in pairs), text)
    try:
        session_query.parse(dict(pairs))
    except UsageError as error:
        raise BadValue(str(error)) from None
    return tuple(pairs)


def _session(text: str) -> str:
    try:
        session_query.parse({"id": text})
    except UsageError:
        raise BadValue(f"{shown(text)} is not the id of a connection, as `tproxy-relay sessions` shows it") from None
    return text


def _route_table(text: str) -> int:
    number = whole(1, MAX_ROUTE_TABLE).parse(text)
    if number in KERNEL_ROUTE_TABLES:
        raise BadValue(f"{text} is one of the kernel's own routing tables: take another number")
    assert isinstance(number, int)
    return number


def _congestion(text: str) -> str:
    # tcp(7), TCP_CONGESTION; whether the kernel has it shows where it is used.
    if not _CONGESTION.fullmatch(text):
        raise BadValue(f"{shown(text)} is not the name of a congestion control")
    return text


def _account(text: str) -> str:
    # The number or the name of an account (useradd(8)); whether there is one shows where it is used.
    if not _ACCOUNT.fullmatch(text):
        raise BadValue(f"{shown(text)} is not the name or number of an account")
    return text


PORT = Kind(_port, "a TCP port, 1-65535")
PORT_RANGES = Kind(_port_ranges, f"ports and ranges such as 8000-8100, up to {MAX_ITEMS} of them, with commas between")
NETWORKS = Kind(
    _networks,
    "networks or addresses, each with a port or a range of ports if not all are meant, such as 10.0.0.0/8, "
    f"192.0.2.1:443 or [2001:db8::/32]:8000-8100; up to {MAX_ITEMS} of them, with commas between",
)
ACCOUNT = Kind(_account, "the name or number of an account")
CONGESTION = Kind(_congestion, "a name that net.ipv4.tcp_allowed_congestion_control has, such as bbr or cubic")
ROUTE_TABLE = Kind(_route_table, f"1 to {MAX_ROUTE_TABLE}, but for 253 to 255")
PORTS = Kind(_ports, f"1-65535, up to {MAX_ITEMS} of them, with commas between")
ADDRESSES = Kind(_addresses, "numeric IPv4 and IPv6 addresses, with commas between")
INTERFACE = Kind(_interface, "the name of an interface, such as eth0")
TARGET = Kind(_target, "HOST:PORT, or [IPv6 address]:PORT; a host name or an address")
MASK = Kind(_mask, "32 bits with exactly three of them set, hexadecimal or decimal", lambda value: f"{value:#010x}")
SHOW = Kind(
    _show,
    "text=TEXT, client=NETWORK, destination=NETWORK, port=PORT, state=connecting | open | half-closed, ending=OUTCOME, "
    "min-age=SECONDS, min-idle=SECONDS, min-rate=BYTES, sort=age | idle | rate | bytes | client | destination, "
    "reverse=yes, limit=NUMBER; with commas between",
    lambda value: ",".join("=".join(pair) for pair in value),  # type: ignore[attr-defined]
)
SESSION = Kind(_session, "the id of a connection")
ADMIN = Kind(_admin, "a port of a loopback address, such as 127.0.0.1:9106, or the path of a unix socket")
PATH = Kind(_path, "the name of a file")
FOLDER = Kind(_path, "the name of a folder")
