"""Rules about destinations, against an oracle that is slow and obvious.

The oracle knows addresses as text and as bytes, and looks at every rule for every question. It shares nothing with
acl.py but the list of special networks.
"""

import ipaddress
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import written
from hypothesis import assume, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.acl import SPECIAL, AccessList
from tproxy_relay.relay.policy import Policy, RefusedError
from tproxy_relay.settings import Network, PortRange

# --- the oracle

CARRIERS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("::/96", lambda packed: packed[12:]),
    ("::ffff:0:0/96", lambda packed: packed[12:]),
    ("::ffff:0:0:0/96", lambda packed: packed[12:]),
    ("64:ff9b::/96", lambda packed: packed[12:]),
    ("64:ff9b:1::/48", lambda packed: packed[12:]),
    ("64:ff9b:1::/48", lambda packed: packed[6:8] + packed[9:11]),
    ("2002::/16", lambda packed: packed[2:6]),
    ("2001::/32", lambda packed: packed[4:8]),
    ("2001::/32", lambda packed: bytes(255 - one for one in packed[12:])),
)
"""Networks of IPv6, and where in their addresses an IPv4 one stands (RFC 4291, 2765, 6052, 8215, 3056, 4380)."""


def carried(address: ipaddress.IPv6Address) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses in it."""
    packed = address.packed
    if str(address) not in ("::", "::1"):
        for network, take in CARRIERS:
            if address in ipaddress.IPv6Network(network) and not is_padding(network, take(packed)):
                yield ipaddress.IPv4Address(take(packed))
    if packed[8:12] in (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe"):  # ISATAP, RFC 5214
        yield ipaddress.IPv4Address(packed[12:])


def is_padding(network: str, taken: bytes) -> bool:
    """64:ff9b:1::/48 has an address in one of two places; in the other one are mostly zeros."""
    return network == "64:ff9b:1::/48" and taken[0] == 0


def verdict_of_one(address: Any, port: int, allow: Sequence[Network], deny: Sequence[Network]) -> bool | None:
    """The longest prefix wins, a rule about some ports before one about all, then deny, then allow, then what is
    denied from the beginning."""
    lists = {"deny": deny, "allow": allow, "special": [Network(text) for text, _ in SPECIAL]}
    matches: list[tuple[int, bool, str]] = []
    for name, rules in lists.items():
        for rule in rules:
            network = ipaddress.ip_network(rule.address)
            if address.version == network.version and address in network:
                if rule.ports is None or rule.ports.first <= port <= rule.ports.last:
                    matches.append((network.prefixlen, rule.ports is not None, name))
    longest = max((length for length, _, _ in matches), default=0)
    names = {some: {m[2] for m in matches if m[:2] == (longest, some)} for some in (True, False)}
    winners = names[True] or names[False]
    return None if not winners else "allow" in winners and "deny" not in winners


def verdict(host: str, port: int, allow: Sequence[Network], deny: Sequence[Network]) -> bool | None:
    """Denied if one of its forms is, allowed if rules allow all of those that they speak of."""
    address = ipaddress.ip_address(host)
    forms = [address, *(carried(address) if isinstance(address, ipaddress.IPv6Address) else ())]
    verdicts = {verdict_of_one(form, port, allow, deny) for form in forms}
    return False if False in verdicts else True if True in verdicts else None


# --- what is asked

IPV4 = st.ip_addresses(v=4)
CLOSE = st.integers(0, 0x3FF).map(lambda low: ipaddress.IPv4Address(0x0A000000 + low))
"""So near to each other that networks round them often meet."""
SPECIAL_ONES = st.sampled_from([Network(text) for text, _ in SPECIAL])
FEW = st.builds(
    Network,
    st.sampled_from(["10.0.0.0/22", "10.0.0.0/24", "10.0.1.0/24", "0.0.0.0/0", "::/0", "64:ff9b::/96"]),
    st.sampled_from([None, PortRange(80, 443), PortRange(80, 80)]),
)
"""So few that the same network comes with ports and without, allowed and denied."""
LIST = st.lists(FEW | written.networks(CLOSE | st.ip_addresses()) | SPECIAL_ONES, max_size=5, unique=True)
PORT = written.PORTS | st.sampled_from([80, 443])


def _of(*parts: str | bytes) -> str:
    return str(ipaddress.IPv6Address(b"".join(bytes.fromhex(p) if isinstance(p, str) else p for p in parts)))


DISGUISES: dict[str, Callable[[bytes, bytes], str]] = {
    "compatible": lambda ip, _: _of("00" * 12, ip),
    "mapped": lambda ip, _: _of("00" * 10, "ffff", ip),
    "translated": lambda ip, _: _of("00" * 8, "ffff0000", ip),
    "NAT64": lambda ip, _: _of("0064ff9b", "00" * 8, ip),
    "NAT64 of the site": lambda ip, any_: _of("0064ff9b0001", any_[:6], ip),
    "NAT64 of the site, RFC 6052": lambda ip, any_: _of("0064ff9b0001", ip[:2], any_[:1], ip[2:], any_[1:6]),
    "6to4": lambda ip, any_: _of("2002", ip, any_),
    "Teredo server": lambda ip, any_: _of("20010000", ip, any_[:8]),
    "Teredo client": lambda ip, any_: _of("20010000", any_[:8], bytes(255 - one for one in ip)),
    "ISATAP": lambda ip, any_: _of(any_[:8], "00005efe", ip),
    "ISATAP, global": lambda ip, any_: _of(any_[:8], "02005efe", ip),
}
"""An IPv4 address in an IPv6 one, the other bytes of which are any."""
FILLING = st.binary(min_size=10, max_size=10)


@st.composite
def inside(draw: st.DrawFn, network: str) -> ipaddress.IPv4Address:
    """Any address of that network."""
    parsed = ipaddress.IPv4Network(network)
    return parsed.network_address + draw(st.integers(0, parsed.num_addresses - 1))


@st.composite
def questions(draw: st.DrawFn, named: Sequence[Network]) -> str:
    """An address: any, one of those that are near, the first or last one of a network, or one of them in disguise."""
    edges = [address for one in named for address in (_network(one)[0], _network(one)[-1])]
    address = draw(st.one_of(*([st.sampled_from(edges)] if edges else []), CLOSE, st.ip_addresses()))
    if address.version == 4 and draw(st.booleans()):
        return draw(st.sampled_from(list(DISGUISES.values())))(address.packed, draw(FILLING))
    return str(address)


def _network(one: Network) -> Any:
    return ipaddress.ip_network(one.address)


@hypothesis_settings(max_examples=300)
@given(st.data(), LIST, LIST, PORT)
def test_the_verdict_is_that_of_the_oracle(
    data: st.DataObject, allow: list[Network], deny: list[Network], port: int
) -> None:
    rules = AccessList(allow, deny)
    for _ in range(3):
        host = data.draw(questions([*allow, *deny]))
        at = data.draw(st.sampled_from([port, *(one.ports.first for one in allow + deny if one.ports)]))
        assert rules.judge(host, at).allowed is verdict(host, at, allow, deny), (host, at)


@hypothesis_settings(max_examples=200)
@given(written.networks(CLOSE | st.ip_addresses()), PORT)
def test_deny_wins_a_tie(network: Network, port: int) -> None:
    port = network.ports.last if network.ports else port
    assert AccessList([network], [network]).judge(str(_network(network)[-1]), port).allowed is False


@hypothesis_settings(max_examples=200)
@given(written.networks(CLOSE), written.ranges_apart(count=1))
def test_a_rule_about_some_ports_comes_before_one_about_all(network: Network, ranges: tuple[PortRange]) -> None:
    everywhere, here = network._replace(ports=None), network._replace(ports=ranges[0])
    host = str(_network(network)[0])
    assume(not host.startswith("0."))
    assert AccessList([here], [everywhere]).judge(host, ranges[0].last).allowed is True
    assert AccessList([everywhere], [here]).judge(host, ranges[0].last).allowed is False


@given(SPECIAL_ONES, PORT)
def test_what_is_denied_from_the_beginning_is_open_to_whoever_names_it(network: Network, port: int) -> None:
    """For IPv6 without the addresses in which IPv4 ones are carried: those are judged, too."""
    first, last = str(_network(network)[0]), str(_network(network)[-1])
    assert AccessList([], []).judge(last, port).allowed is False
    assert AccessList([network], []).judge(last, port).allowed is True
    assert AccessList([network], [network]).judge(first, port).allowed is False
    everything = [Network("0.0.0.0/0"), Network("::/0")]
    assert AccessList(everything, []).judge(last, port).allowed is False


@hypothesis_settings(max_examples=300)
@given(
    st.sampled_from([one for one, _ in SPECIAL if ":" not in one]).flatmap(inside),
    st.sampled_from(sorted(DISGUISES)),
    FILLING,
    PORT,
)
@example(ipaddress.IPv4Address("169.254.169.254"), "NAT64 of the site, RFC 6052", b"\xff" * 10, 80)
def test_a_special_address_is_denied_in_every_disguise(
    address: ipaddress.IPv4Address, disguise: str, filling: bytes, port: int
) -> None:
    assume(address.packed[0] or "site" not in disguise)
    host = DISGUISES[disguise](address.packed, filling)
    everything = [Network("0.0.0.0/0"), Network("::/0")]
    assert choose(host, port, allow=everything, deny=[]) is Outcome.DENIED, host


@hypothesis_settings(max_examples=200)
@given(written.networks(IPV4), st.sampled_from(sorted(DISGUISES)), FILLING, PORT, st.data())
def test_a_denied_address_is_denied_in_every_disguise(
    network: Network, disguise: str, filling: bytes, port: int, data: st.DataObject
) -> None:
    address = data.draw(inside(network.address))
    assume(address.packed[0] or "site" not in disguise)
    port = network.ports.first if network.ports else port
    host = DISGUISES[disguise](address.packed, filling)
    assert choose(host, port, allow=[Network("::/0")], deny=[network]) is Outcome.DENIED, host


def choose(host: str, port: int, *, allow: Sequence[Network], deny: Sequence[Network]) -> Endpoint | Outcome:
    """What becomes of a connection that was going there."""
    try:
        chosen = Policy(frozenset({15006}), None, tuple(allow), tuple(deny))
        return chosen.choose(Endpoint(host, port), 15006)
    except RefusedError as refusal:
        return refusal.outcome
