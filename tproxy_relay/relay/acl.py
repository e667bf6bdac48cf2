"""Which destinations are allowed, and which are denied.

A rule is a network and perhaps some ports; the rule with the longest prefix that matches wins, one about some ports
before one about all, a configured one before those of the beginning, and `deny` before `allow`. So `allow = 0.0.0.0/0`
does not open the special networks that are denied from the beginning, and `allow = 127.0.0.0/8` does.

An IPv6 address may carry an IPv4 one, and a translator on the way, or the kernel, takes it out. Both are judged, and
each of them must be allowed. Own tables: what `ipaddress` calls private changed between versions of Python.
"""

import ipaddress
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from tproxy_relay.settings import Network, PortRange

SPECIAL: tuple[tuple[str, str], ...] = (
    ("0.0.0.0/8", "this host"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local, and the metadata of clouds"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved, and broadcast"),
    ("::/128", "this host"),
    ("::1/128", "loopback"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),
    ("ff00::/8", "multicast"),
    ("fd00:ec2::254/128", "the metadata of a cloud"),
)
"""Denied from the beginning (IANA's registries of special-purpose addresses, RFC 6890; connect() to 0.0.0.0 reaches
127.0.0.1). The last one is what AWS documents for its instances."""

_EVERY_PORT = PortRange(0, 65535)
_REMEMBERED = 4096
"""Destinations whose verdict is kept: most connections of a relay go to a few."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Verdict(NamedTuple):
    """What an access list says about one destination."""

    allowed: bool | None
    """None: no rule says anything about it."""
    why: str
    """The rule, in the operator's words."""


class _Rule(NamedTuple):
    version: int
    network: int
    mask: int
    ports: PortRange
    rank: tuple[int, bool, bool, bool]
    """Of two that match, the one with more counts."""
    verdict: Verdict


class AccessList:
    """The rules of a configuration and of the special networks, which judge a destination."""

    def __init__(self, allow: Sequence[Network], deny: Sequence[Network]) -> None:
        special = (_rule(Network(text), False, f"{text} ({what})", configured=False) for text, what in SPECIAL)
        allowed = (_rule(one, True, f"allow = {one}") for one in allow)
        denied = (_rule(one, False, f"deny = {one}") for one in deny)
        self._rules = sorted((*special, *allowed, *denied), key=lambda rule: rule.rank, reverse=True)
        self._known: dict[tuple[str, int], Verdict] = {}

    def judge(self, host: str, port: int) -> Verdict:
        """The verdict about an address, without scope, and a port. ValueError if it is none."""
        verdict = self._known.get((host, port))
        if verdict is None:
            verdict = _strictest([self._first(form, port) for form in forms(host)])
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[host, port] = verdict
        return verdict

    def _first(self, address: Address, port: int) -> Verdict:
        number = int(address)
        for rule in self._rules:
            if rule.version == address.version and number & rule.mask == rule.network and rule.ports.covers(port):
                return rule.verdict
        return _SILENT


_SILENT = Verdict(None, "")


def _strictest(verdicts: Sequence[Verdict]) -> Verdict:
    """One form that is denied is enough. Allowed is what all rules that speak of it allow."""
    denied = [one for one in verdicts if one.allowed is False]
    spoken = [one for one in verdicts if one.allowed is not None]
    return (denied or spoken or [_SILENT])[0]


def _rule(network: Network, allowed: bool, why: str, *, configured: bool = True) -> _Rule:
    parsed = ipaddress.ip_network(network.address)
    rank = (parsed.prefixlen, network.ports is not None, configured, not allowed)
    start, mask = int(parsed.network_address), int(parsed.netmask)
    return _Rule(parsed.version, start, mask, network.ports or _EVERY_PORT, rank, Verdict(allowed, why))


@lru_cache(maxsize=_REMEMBERED)
def forms(host: str) -> tuple[Address, ...]:
    """The address, and those that it carries. ValueError if it is none."""
    address = ipaddress.ip_address(host)
    found: dict[Address, None] = {address: None}
    if isinstance(address, ipaddress.IPv6Address):
        found.update((ipaddress.IPv4Address(number), None) for number in _carried(int(address)))
    return tuple(found)


def _carried(number: int) -> Iterator[int]:
    low = number & 0xFFFFFFFF
    top96 = number >> 32
    if top96 in _CARRIED_LOW and number > 1:
        yield low
    if number >> 80 == 0x0064FF9B0001:  # 64:ff9b:1::/48, RFC 8215: in the places of RFC 6052 for /48, or for /96
        places = (number >> 48 & 0xFFFF0000) | (number >> 40 & 0xFFFF), low
        yield from (one for one in places if one >> 24)  # in the other places are zeros
    if number >> 112 == 0x2002:  # 6to4, RFC 3056
        yield number >> 80 & 0xFFFFFFFF
    if number >> 96 == 0x20010000:  # Teredo, RFC 4380: the server, and the client with all bits turned over
        yield number >> 64 & 0xFFFFFFFF
        yield low ^ 0xFFFFFFFF
    if (top96 & 0xFFFFFFFF) | 0x02000000 == 0x02005EFE:  # ISATAP, RFC 5214; the kernel does not look at the prefix
        yield low


_CARRIED_LOW = frozenset(
    {
        0,  # ::/96, IPv4-compatible, RFC 4291
        0xFFFF,  # ::ffff:0:0/96, IPv4-mapped, RFC 4291
        0xFFFF0000,  # ::ffff:0:0:0/96, IPv4-translated, RFC 2765
        0x0064FF9B << 64,  # 64:ff9b::/96, NAT64, RFC 6052
    }
)
"""The first 96 bits of networks that carry the IPv4 address in the last 32."""
