"""What may be written for a setting, and what it becomes; addresses and networks are in option_addresses.

An ``OptionType`` turns text into a value or raises ``BadValue`` with the reason in the user's words, and says in
``allowed`` what it takes. It knows neither options nor where the text stood. Text is ASCII wherever the
kernel or the resolver reads it: int() and str.isdigit() would also take '٣', '1_000' and '+5'.
"""

import argparse
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tproxy_relay import session_query
from tproxy_relay.errors import UsageError
from tproxy_relay.settings import KERNEL_ROUTE_TABLES, HostPort, PortRange

MIN_SECONDS, MAX_SECONDS = 0.001, 2147483
"""poll(2), TCP_USER_TIMEOUT and the like take milliseconds in a C int: a little under 25 days."""
MAX_PACING = 0xFFFFFFFE
"""Bytes a second: 34 Gbit/s. One more means no limit to older kernels."""
MIN_BUFFER, MAX_BUFFER = 4096, 1 << 30
"""Bytes; the kernel doubles it, and takes an int (socket(7))."""
MAX_KEEPALIVE = 32767
"""Seconds; Linux refuses a larger TCP_KEEPIDLE (MAX_TCP_KEEPIDLE in include/net/tcp.h)."""
MAX_WORKERS = 64
MAX_CONNECTIONS = 1_000_000
MAX_ITEMS = 64
MAX_ROUTE_TABLE = 0xFFFFFFFF
"""rtnetlink(7): a table's number has 32 bits."""
MAX_PATH = 4095
"""PATH_MAX in linux/limits.h, less the NUL at the end."""

_BLANKS = " \t"
_WHOLE = re.compile(r"0|[1-9][0-9]*")
_SECONDS = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_MASK = re.compile(r"0[xX][0-9a-fA-F]{1,8}|[1-9][0-9]{0,9}")
_CONGESTION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,14}")
"""linux/net/tcp.h: TCP_CA_NAME_MAX is 16 with the final zero."""
_ACCOUNT = re.compile(r"0|[1-9][0-9]{0,9}|[A-Za-z_][A-Za-z0-9_.-]{0,31}")


class BadValue(argparse.ArgumentTypeError):
    """The text is not a value of this type. ``str()`` of it is the reason."""


@dataclass(frozen=True)
class OptionType:
    """How to read a value, how to write it, and what is allowed. `parse` raises BadValue."""

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


def words(*allowed: str) -> OptionType:
    """The type of an option that is one of a few words, in capitals or not: LOG_LEVEL is often INFO."""

    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise BadValue(f"{shown(text)} is not one of {', '.join(allowed)}")
        return text.lower()

    return OptionType(parse, " | ".join(allowed), words=allowed)


def whole(least: int, most: int, note: str = "") -> OptionType:
    """The type of a whole number from ``least`` to ``most``; `note` says what some of them mean."""

    def parse(text: str) -> int:
        # Ten digits are past every limit here, and int() refuses thousands of them.
        if not _WHOLE.fullmatch(text) or len(text) > 10 or not least <= int(text) <= most:
            raise BadValue(f"{shown(text)} is not a whole number from {least} to {most}")
        return int(text)

    return OptionType(parse, f"{least} to {most}{note}")


def buffer() -> OptionType:
    """The type of the bytes of a socket's buffer, or 0."""
    some = whole(MIN_BUFFER, MAX_BUFFER)
    return OptionType(lambda text: 0 if text == "0" else some.parse(text), f"0, or {some.allowed}")


def connections() -> OptionType:
    """The type of a cap on connections, or ``auto``, which is None."""
    return _or_auto(whole(1, MAX_CONNECTIONS))


def workers() -> OptionType:
    """The type of a number of processes, or ``auto``, which is None."""
    return _or_auto(whole(1, MAX_WORKERS))


def _or_auto(number: OptionType) -> OptionType:
    def parse(text: str) -> object:
        return None if text == "auto" else number.parse(text)

    return OptionType(parse, f"auto, or {number.allowed}", lambda value: text_of(value) or "auto", ("auto",))


def seconds(zero: str | None) -> OptionType:
    """The type of a duration in seconds. ``zero`` says what 0 means; with None it is refused."""

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
    return OptionType(parse, f"seconds, {MIN_SECONDS} to {MAX_SECONDS}{note}")


def items_of(text: str) -> list[str]:
    """What stands between the commas; blanks round a comma do not matter. Raises BadValue for an empty item, or more
    than MAX_ITEMS."""
    items = [item.strip(_BLANKS) for item in text.split(",")]
    if "" in items:
        raise BadValue(f"an item is empty in {shown(text)}" if text else "no value given")
    if len(items) > MAX_ITEMS:
        raise BadValue(f"{len(items)} items are too many: at most {MAX_ITEMS}")
    return items


def refuse_twins(values: Iterable[object], text: str) -> None:
    """Raise BadValue if one of the values, which come from the text, is there twice."""
    seen = set()
    for value in values:
        if value in seen:
            raise BadValue(f"{value} is there twice in {shown(text)}")
        seen.add(value)


def parse_port(text: str) -> int:
    """A TCP port, 1 to 65535. Raises BadValue."""
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise BadValue(f"{shown(text)} is not a TCP port (1-65535)")
    return int(text)


def _ports(text: str) -> tuple[int, ...]:
    items = items_of(text)
    try:
        ports = tuple(map(parse_port, items))
    except BadValue as error:
        raise BadValue(f"{error} in {shown(text)}" if len(items) > 1 else str(error)) from None
    refuse_twins(ports, text)
    return ports


def _mask(text: str) -> int:
    value = int(text, 0) if _MASK.fullmatch(text) else 0
    if value.bit_count() != 3 or value > 0xFFFFFFFF:
        raise BadValue(f"{shown(text)} is not a 32-bit mask with exactly three bits set, such as 0x07000000")
    return value


def parse_path(text: str) -> str:
    """The name of a file or a folder, which need not be there. Raises BadValue."""
    # A log line or a printed config must stay one line whatever the file is called.
    if not text.isprintable():
        raise BadValue(f"{shown(text)} has characters that cannot be printed")
    if text in ("", "--") or len(text) > MAX_PATH:
        raise BadValue(f"{shown(text)} is not the name of a file")
    return text


def _port_ranges(text: str) -> tuple[PortRange, ...]:
    """Ports and ranges of them, smallest first; two that overlap are one slip of the keyboard."""
    ranges = []
    for item in items_of(text):
        first, dash, last = item.partition("-")
        try:
            one = PortRange(parse_port(first.strip(_BLANKS)), parse_port((last if dash else first).strip(_BLANKS)))
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


def parse_port_range(text: str) -> PortRange:
    """A port, or two with a dash between. Raises BadValue."""
    first, dash, last = text.partition("-")
    ports = PortRange(parse_port(first), parse_port(last if dash else first))
    if ports.first > ports.last:
        raise BadValue(f"{text} runs backwards: write {ports.last}-{ports.first}")
    return ports


def _show(text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for item in items_of(text) if text else []:
        name, equals, value = item.partition("=")
        if not equals:
            raise BadValue(
                f"{shown(item)} is not NAME=VALUE, such as port=443; names: {', '.join(session_query.NAMES)}"
            )
        pairs.append((name.strip(_BLANKS), value.strip(_BLANKS)))
    refuse_twins((name for name, _ in pairs), text)
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


PORT = OptionType(parse_port, "a TCP port, 1-65535")
PORT_RANGES = OptionType(
    _port_ranges, f"ports and ranges such as 8000-8100, up to {MAX_ITEMS} of them, with commas between"
)
ACCOUNT = OptionType(_account, "the name or number of an account")
CONGESTION = OptionType(_congestion, "a name that net.ipv4.tcp_allowed_congestion_control has, such as bbr or cubic")
ROUTE_TABLE = OptionType(_route_table, f"1 to {MAX_ROUTE_TABLE}, but for 253 to 255")
PORTS = OptionType(_ports, f"1-65535, up to {MAX_ITEMS} of them, with commas between")
MASK = OptionType(
    _mask, "32 bits with exactly three of them set, hexadecimal or decimal", lambda value: f"{value:#010x}"
)
SHOW = OptionType(
    _show,
    "text=TEXT, client=NETWORK, destination=NETWORK, port=PORT, state=connecting | open | half-closed, ending=OUTCOME, "
    "min-age=SECONDS, min-idle=SECONDS, min-rate=BYTES, sort=age | idle | rate | bytes | client | destination, "
    "reverse=yes, limit=NUMBER; with commas between",
    lambda value: ",".join("=".join(pair) for pair in value),  # type: ignore[attr-defined]
)
SESSION = OptionType(_session, "the id of a connection")
PATH = OptionType(parse_path, "the name of a file")
FOLDER = OptionType(parse_path, "the name of a folder")
