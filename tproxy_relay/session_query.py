"""Which live connections somebody wants to see, in which order, and how many of them.

The same words everywhere: options of `tproxy-relay sessions` and fields of the query of /sessions.
"""

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tproxy_relay.errors import UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
AnyNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

STATES = ("connecting", "open", "half-closed")
SORTS = ("age", "idle", "rate", "bytes", "client", "destination")
"""The first is the usual one. Numbers begin with the largest."""
TEXTS = frozenset({"client", "destination"})
MAX_LIMIT = 1_000_000
MAX_REFUSED = 20
"""Records of connections that were refused which are kept, and shown."""
MAX_TEXT = 60

_NUMBER = re.compile(r"[0-9]{1,15}(\.[0-9]{1,6})?")
_ID = re.compile(r"[0-9a-f]{1,16}(-[0-9a-f]{1,16}){2}")


@dataclass(frozen=True)
class Query:
    """Which connections, in which order, and how many at most. A field that is None or 0 leaves none out."""

    id: str | None = None
    text: str | None = None
    """Some of its id, its client or what it asked for."""
    client: AnyNetwork | None = None
    """Of its address."""
    destination: AnyNetwork | None = None
    """Of the address that the client asked for."""
    port: int | None = None
    """The port that it asked for."""
    state: str | None = None
    ending: str | None = None
    """The outcome that it has, or will have first if nothing moves."""
    min_age: float = 0.0
    """Seconds."""
    min_idle: float = 0.0
    """Seconds."""
    min_rate: float = 0.0
    """Bytes a second, both ways together."""
    sort: str = SORTS[0]
    reverse: bool = False
    limit: int = MAX_LIMIT

    @property
    def chooses(self) -> bool:
        """True if there may be connections that do not match; order and number do not count."""
        return replace(self, sort=SORTS[0], reverse=False, limit=MAX_LIMIT) != _EVERYTHING


_EVERYTHING = Query()


def parse(given: Mapping[str, str]) -> Query:
    """The query that these texts mean, by name of the field with `-` for `_`, as they stand in a URL or on the command
    line. Raises UsageError for an unknown name or a text that is no value."""
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise UsageError(f"no such filter: {unknown[0]!r}; there are {', '.join(NAMES)}")
    values: dict[str, Any] = {}
    for name, text in given.items():
        try:
            values[name.replace("-", "_")] = _PARSERS[name](text)
        except ValueError as error:
            raise UsageError(f"{name}: {text[:60]!r} is not {error}") from None
    return Query(**values)


def written(query: Query) -> dict[str, str]:
    """The texts of which parse() makes this query; fields with their default are left out."""
    texts = {}
    for field in fields(Query):
        value = getattr(query, field.name)
        if value != field.default:
            texts[field.name.replace("_", "-")] = "yes" if value is True else str(value)
    return texts


def _network(text: str) -> AnyNetwork:
    try:
        return ipaddress.ip_network(text.removeprefix("[").removesuffix("]"), strict=False)
    except ValueError:
        raise ValueError("an address or a network") from None


def _port(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text) or int(text) > 65535:
        raise ValueError("a port")
    return int(text)


def _number(what: str) -> Callable[[str], float]:
    def parse_number(text: str) -> float:
        if not _NUMBER.fullmatch(text):
            raise ValueError(what)
        return float(text)

    return parse_number


def _word(*words: str) -> Callable[[str], str]:
    def parse_word(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return parse_word


def _id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError("the id of a connection")
    return text


def _text(text: str) -> str:
    if not text or len(text) > MAX_TEXT or not text.isprintable():
        raise ValueError(f"a text of up to {MAX_TEXT} characters")
    return text


def _outcome(text: str) -> str:
    if not re.fullmatch(r"[a-z-]{1,30}", text):
        raise ValueError("an outcome")
    return text


def _limit(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ValueError(f"a number from 1 to {MAX_LIMIT - 1}")
    return int(text)


_PARSERS: dict[str, Callable[[str], object]] = {
    "id": _id,
    "text": _text,
    "client": _network,
    "destination": _network,
    "port": _port,
    "state": _word(*STATES),
    "ending": _outcome,
    "min-age": _number("a number of seconds"),
    "min-idle": _number("a number of seconds"),
    "min-rate": _number("a number of bytes a second"),
    "sort": _word(*SORTS),
    "reverse": lambda text: _word("yes", "no")(text) == "yes",
    "limit": _limit,
}
NAMES = tuple(_PARSERS)
"""Of the fields, as users write them."""
