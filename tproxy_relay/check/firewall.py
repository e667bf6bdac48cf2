"""The rules of other programs, nft's and iptables' in one form, and what they would do to one packet.

A condition that is not understood here, or that depends on what the packet does not say, is neither true nor
false. So a verdict is certain only where no such condition stands in the way; `maybe` says that it may be accepted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

ACCEPT, DROP, MAYBE = "accept", "drop", "maybe"
ALL_BITS = 0xFFFFFFFF

_TO_US = frozenset({"tproxy", "redirect", "dnat"})
_REWRITES_SOURCE = frozenset({"masquerade", "snat"})
_ENDS = frozenset({"accept", "drop", "maybe", "synproxy", *_TO_US, *_REWRITES_SOURCE})
_DEPTH = 16
"""Jumps within jumps; nft itself allows no more."""


class Packet(NamedTuple):
    """What is known of a packet; the first of its connection, where nothing else is said."""

    family: int
    port: int | None
    """The destination's; None if it may be any."""
    mark: int
    """Within `mask`; the other bits are unknown."""
    mask: int
    iif: str | None
    """None: any interface but lo."""
    oif: str | None
    sport: int | None = None
    state: str = "new"
    """Of its connection: new or established."""
    ct_mark: int | None = None
    """The mark of its connection, within `mask`."""
    way_back: bool | None = None
    """Whether the kernel finds the way back to its source by the interface that it came in by."""


class Condition(NamedTuple):
    """One thing that a rule asks; `kind` is proto, ports, sports, iif, oif, mark, ct_mark, state, family, way_back or
    unknown."""

    kind: str
    values: tuple[tuple[int, int], ...] | tuple[str, ...] = ()
    """Ranges of numbers, or words; of a mark its value and its mask."""
    negated: bool = False

    def holds(self, packet: Packet) -> bool | None:
        """Whether the packet fulfils it; None if that is not known."""
        answer = _holds(self, packet)
        return answer if answer is None else answer != self.negated


class Change(NamedTuple):
    """What a rule does to a mark: it becomes `of_mark & mark ^ of_ct_mark & ct_mark ^ value`."""

    what: str
    """mark, that of the packet; or ct_mark, that of its connection."""
    of_mark: int
    of_ct_mark: int
    value: int
    certain: bool = True
    """False if it is done to some packets only, as with a map."""
    known: bool = True
    """False for what nobody can tell: a number by turns, a hash."""

    def bits(self, packet: Packet) -> int | None:
        """What comes out of it within the packet's mask; None if that is not known."""
        sources = self.of_ct_mark & packet.mask and packet.ct_mark is None
        if sources or not self.known:
            return None
        return (self.of_mark & packet.mark ^ self.of_ct_mark & (packet.ct_mark or 0) ^ self.value) & packet.mask


def no_command(*_: object) -> str:
    """For what no command can be given for."""
    return ""


@dataclass(frozen=True)
class Rule:
    """A rule in a chain of another program: its conditions, and what is done where they are fulfilled."""

    conditions: tuple[Condition, ...]
    action: str
    """accept, drop, return, jump, goto, tproxy, masquerade ...; '' if it decides nothing."""
    target: str
    """The chain that a jump leads to."""
    marks: tuple[tuple[int, int], ...]
    """Value and mask of each firewall mark that it sets or asks for."""
    where: str
    """The rule in the words of its program."""
    changes: tuple[Change, ...] = ()
    untracks: bool = False
    """True if connections of its packets are not tracked."""
    spare: Callable[[int, int], str] = no_command
    """The command that has the same rule leave bits of marks alone: given those that matter to it, and all of the
    relay's; '' if there is none that is safe to give."""

    def matches(self, packet: Packet) -> bool | None:
        """True, False, or None if that is not known."""
        answers = [condition.holds(packet) for condition in self.conditions]
        return False if False in answers else (None if None in answers else True)


@dataclass(frozen=True)
class Chain:
    """A chain of another program with its rules, in order."""

    name: str
    title: str
    """As a person would name it, with its table and program."""
    hook: str
    """In small letters; '' for one that is only jumped to."""
    kind: str
    """filter, nat, route, or '': in iptables' words mangle and raw are filter too."""
    families: tuple[int, ...]
    drops: bool
    """What its policy does."""
    rules: tuple[Rule, ...]
    insert: Callable[[int], str] = no_command
    """The command that lets in packets with any of these bits in their mark; or ''."""
    priority: int = 0
    """Of its hook: the lower, the earlier (linux/netfilter_ipv4.h)."""
    let_pass: Callable[[str], str] = no_command
    """The command that lets pass what fulfils a condition, which is in the words of the chain's program; or ''."""

    @property
    def is_of_nft(self) -> bool:
        """False for one of iptables."""
        return self.title.startswith("nft ")


Firewall = Mapping[str, Mapping[str, Chain]]
"""By table, by name, every chain."""


def base_chains(firewall: Firewall, hook: str, kind: str, family: int) -> Iterator[tuple[Chain, Mapping[str, Chain]]]:
    """The chains of that hook that see packets of that family, each with the chains of its table."""
    for table in firewall.values():
        for chain in table.values():
            if chain.hook == hook and chain.kind == kind and family in chain.families:
                yield chain, table


def verdict(chain: Chain, table: Mapping[str, Chain], packet: Packet) -> tuple[str, str]:
    """What becomes of the packet: ACCEPT, DROP or MAYBE, and for DROP the words of what drops it."""
    decided = _walk(chain, table, packet, _DEPTH)
    if decided:
        return decided
    return (DROP, f"policy drop of {chain.title}") if chain.drops else (ACCEPT, "")


def rewrites_source(firewall: Firewall, packet: Packet) -> Iterator[tuple[Rule, bool]]:
    """The rules that give a new source to such a packet on its way out, and whether that is certain."""
    for chain, table in base_chains(firewall, "postrouting", "nat", packet.family):
        for rule, certain in _taken(chain, table, packet, _DEPTH, True):
            if rule.action in _REWRITES_SOURCE:
                yield rule, certain


def all_rules(firewall: Firewall) -> Iterator[tuple[Chain, Rule]]:
    """Every rule of every table, each with the chain that it is in."""
    for table in firewall.values():
        for chain in table.values():
            for rule in chain.rules:
                yield chain, rule


def _walk(chain: Chain, table: Mapping[str, Chain], packet: Packet, depth: int) -> tuple[str, str] | None:
    """The decision, or None if the end of the chain, or a return, is reached for certain."""
    for rule in chain.rules:
        match = rule.matches(packet)
        if match is False or not rule.action:
            continue
        if rule.action in ("jump", "goto"):
            if rule.target not in table or depth == 0:
                return MAYBE, ""
            inner = _walk(table[rule.target], table, packet, depth - 1)
            if inner and (match or inner[0] != DROP):
                return inner if match else (MAYBE, "")
            if rule.action == "goto" and match:
                return inner
        elif rule.action == "drop":
            if match:
                return DROP, rule.where
        elif rule.action == "return":
            if match:
                return None
        else:
            return (ACCEPT, "") if match else (MAYBE, "")
    return None


def met(chain: Chain, table: Mapping[str, Chain], packet: Packet) -> Iterator[tuple[Rule, bool]]:
    """The rules whose conditions the packet may fulfil, in order, and whether it comes to them and fulfils them for
    certain."""
    sure = [True]
    for rule, match in _met(chain, table, packet, _DEPTH, sure):
        yield rule, match


def _met(
    chain: Chain, table: Mapping[str, Chain], packet: Packet, depth: int, sure: list[bool]
) -> Iterator[tuple[Rule, bool]]:
    """`sure` holds one value: False from the moment on in which the packet's way may have ended. What ends it for
    certain ends this, too."""
    for rule in chain.rules:
        match = rule.matches(packet)
        if match is False:
            continue
        yield rule, sure[0] and match is True
        if rule.action in ("jump", "goto") and rule.target in table and depth:
            inner = [sure[0] and match is True]
            yield from _met(table[rule.target], table, packet, depth - 1, inner)
            inner[0] = inner[0] or match is None
            sure[0] = sure[0] and inner[0] and _walk(table[rule.target], table, packet, depth) is None
            if rule.action == "goto" and match:
                return
        elif rule.action in (*_ENDS, "return"):
            if match:
                return
            sure[0] = False


def _taken(
    chain: Chain, table: Mapping[str, Chain], packet: Packet, depth: int, certain: bool
) -> Iterator[tuple[Rule, bool]]:
    """The rules that the packet may meet, up to the one that ends its way for certain."""
    for rule in chain.rules:
        match = rule.matches(packet)
        if match is False:
            continue
        yield rule, certain and match is True
        if rule.action in ("jump", "goto") and rule.target in table and depth:
            yield from _taken(table[rule.target], table, packet, depth - 1, certain and match is True)
        elif rule.action in ("accept", "drop", "return", *_REWRITES_SOURCE) and match:
            return


def _holds(condition: Condition, packet: Packet) -> bool | None:
    kind, values = condition.kind, condition.values
    if kind == "proto":
        return "tcp" in values or "6" in values
    if kind == "family":
        return str(packet.family) in values
    if kind in ("ports", "sports"):
        port = packet.port if kind == "ports" else packet.sport
        return None if port is None else any(first <= port <= last for first, last in _numbers(values))
    if kind == "state":
        return _in_state(packet.state, values)
    if kind == "way_back":
        return None if packet.way_back is None else packet.way_back == (values == ("exists",))
    if kind in ("iif", "oif"):
        return _same_interface(packet.iif if kind == "iif" else packet.oif, values)
    if kind == "mark":
        return _same_mark(packet.mark, packet.mask, values)
    if kind == "ct_mark":
        return None if packet.ct_mark is None else _same_mark(packet.ct_mark, packet.mask, values)
    return None


def _in_state(state: str, values: tuple[object, ...]) -> bool | None:
    if state in values:
        return True
    # A new one has neither a NAT nor an older connection.
    return False if state == "new" or set(values) <= {"new", "invalid", "related", "untracked"} else None


def _same_interface(name: str | None, values: tuple[object, ...]) -> bool | None:
    if name is None:
        return False if set(values) == {"lo"} else None
    return any(name == value or _begins(name, str(value)) for value in values)


def _begins(name: str, value: str) -> bool:
    """True for `eth*` of nft and `eth+` of iptables, if the name begins so."""
    return value.endswith(("+", "*")) and name.startswith(value[:-1])


def _same_mark(bits: int, known: int, values: tuple[object, ...]) -> bool | None:
    ((value, mask),) = _numbers(values)
    if (bits ^ value) & mask & known:
        return False
    return True if mask & ~known & ALL_BITS == 0 else None


def _numbers(values: tuple[object, ...]) -> list[tuple[int, int]]:
    return [pair for pair in values if isinstance(pair, tuple)]
