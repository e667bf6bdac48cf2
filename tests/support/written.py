"""For each option that a file can set: texts that an operator may have written there, as strategies of hypothesis."""

import ipaddress
from typing import Any

import pytest
from hypothesis import strategies as st

from tproxy_relay.config.option_types import BadValue, OptionType
from tproxy_relay.config.options import OPTIONS
from tproxy_relay.settings import Network, PortRange

PORTS = st.integers(1, 65535)


def reason(option_type: OptionType, text: str) -> str:
    """Why the text is refused."""
    with pytest.raises(BadValue) as refused:
        option_type.parse(text)
    return str(refused.value)


def separated(items: st.SearchStrategy[Any], most: int = 4) -> st.SearchStrategy[str]:
    """Up to so many different ones, with commas between them, and perhaps blanks round those."""
    some = st.lists(items, min_size=1, max_size=most, unique_by=str)
    return st.tuples(some, st.sampled_from([",", ", ", " ,", "\t,  "])).map(
        lambda both: both[1].join(map(str, both[0]))
    )


@st.composite
def ranges_apart(draw: st.DrawFn, least: int = 1, most: int = 65535, count: int = 6) -> tuple[PortRange, ...]:
    """Ranges of ports of which no two overlap, smallest first."""
    ends = sorted(draw(st.lists(st.integers(least, most), min_size=2, max_size=2 * count, unique=True)))
    single = draw(st.booleans())
    return tuple(PortRange(first, first if single else last) for first, last in zip(ends[::2], ends[1::2]))


@st.composite
def networks(draw: st.DrawFn, addresses: st.SearchStrategy[Any] | None = None) -> Network:
    """A network round one of these addresses, of all its ports or some."""
    address = draw(st.ip_addresses() if addresses is None else addresses)
    length = draw(st.just(address.max_prefixlen) | st.integers(0, address.max_prefixlen))
    if address.version == 6 and address.ipv4_mapped is not None:
        length = min(length, 95)  # longer ones are to be written as the IPv4 networks that they are
    ports = draw(st.none() | ranges_apart(count=1).map(lambda ranges: ranges[0]))
    return Network(
        str(ipaddress.ip_network((int(address).to_bytes(address.max_prefixlen // 8, "big"), length), False)), ports
    )


_SECONDS = st.integers(1, 2147483).map(str) | st.decimals("0.001", 2147483, places=3).map(str)
_NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,14}", fullmatch=True)
_HOSTS = st.sampled_from(["a.example", "192.0.2.1", "[2001:DB8::1]", "localhost.", "x-1"])

# A list of pieces, for in one alphabet the nasty characters would drown among all of Unicode.
_FILE_NAMES = (
    st.lists(
        st.sampled_from([" ", '"', "'", "#", ";", "=", "[", "]", ","])
        | st.text(st.characters(exclude_categories=["C", "Z"]), max_size=3),
        min_size=1,
    )
    .map("".join)
    .filter(lambda name: name not in ("", "--"))
)


def _whole(least: int, most: int) -> st.SearchStrategy[str]:
    return st.integers(least, most).map(str)


ANY: dict[str, st.SearchStrategy[str]] = {
    **{name: st.sampled_from(option.words) for name, option in OPTIONS.items() if option.in_file and option.words},
    **{name: _SECONDS for name in OPTIONS if name.endswith("-timeout") or name == "self-probe"},
    "ports": separated(PORTS),
    "bind": separated(st.sampled_from(["10.0.0.1", "127.0.0.1", "::1", "2001:DB8::2"])),
    "interface": st.sampled_from(["eth0", "wg-1", "a.b_c:d"]),
    "intercept-inbound": ranges_apart(most=15001).map(lambda some: ", ".join(map(str, some))),
    "intercept-outbound": ranges_apart(least=15007).map(lambda some: ",".join(map(str, reversed(some)))),
    "inbound-port": st.just("15006"),
    "outbound-port": st.just("15002"),
    "mark-mask": st.sampled_from(["7", "0x07000000", "0xe0000000", "0X83"]),
    "route-table": _whole(1, 252) | _whole(256, 0xFFFFFFFF),
    "route-priority": _whole(1, 32763),
    "workers": st.just("auto") | _whole(1, 64),
    "max-connections": st.just("auto") | _whole(1, 1_000_000),
    "user": st.sampled_from(["0", "nobody", "4294967295", "_a.b-c"]),
    "target": st.tuples(_HOSTS, PORTS).map(lambda both: f"{both[0]}:{both[1]}"),
    "allow": separated(networks()),
    "deny": separated(networks()),
    "client-congestion": _NAMES,
    "upstream-congestion": _NAMES,
    "client-pacing": _whole(0, 0xFFFFFFFE),
    "upstream-pacing": _whole(0, 0xFFFFFFFE),
    "socket-buffer": st.just("0") | _whole(4096, 1 << 30),
    "max-per-source": _whole(0, 1_000_000),
    "max-rate-per-source": _whole(0, 1_000_000),
    "keepalive": _whole(0, 32767),
    "admin": st.tuples(st.sampled_from(["127.0.0.1", "[::1]", "localhost", "127.3.2.1"]), PORTS).map(
        lambda both: f"{both[0]}:{both[1]}"
    )
    | _FILE_NAMES.map(lambda name: f"/run/{name.replace('/', '')}"[:40]),
    "log-file": _FILE_NAMES,
}
"""By name of the option."""
