"""Connections that conntrack has forgotten: somebody has emptied its table (`conntrack -F`), or it begins to track.

A connection of a program on this host is known by its mark in conntrack, and that is gone. The relay's own packets
bring it back (from_lo in nft.py). But the program may speak first. Such a packet is new to conntrack and yet no SYN; it
is sent to lo, as those of relayed connections are, and there the socket match tells whether the relay has the
connection. If so, the mark stays. If not, it is older than the rules: the packet cannot go back from lo, so it is
dropped, once for each connection. The program sends it again, and that one goes direct, for the mark says so: the bits
IN and OUT.

In mode redirect the translation is gone with the entry, and nothing can bring it back.
"""

from collections.abc import Iterator

from tproxy_relay.intercept import iptables_words, nft_words
from tproxy_relay.intercept.iptables_words import bits, by_ports
from tproxy_relay.intercept.nft_words import is_marked, ports, set_mark
from tproxy_relay.intercept.plan import Plan

_LABEL = "of a connection that is forgotten"
_OURS, _DIRECT = "of a connection that the relay has", "of another, to be sent again"


def nft_of_servers(plan: Plan) -> Iterator[nft_words.Rule]:
    """What a server here sends to a client, who may be the relay in its name."""
    if plan.inbound and plan.keeps_source:
        match = f"{is_marked(plan, 'meta mark', 0)} tcp sport {ports(plan.inbound)} fib daddr type != local"
        yield _nft_to_lo(plan, match, plan.marks.relay)


def nft_of_programs(plan: Plan) -> Iterator[nft_words.Rule]:
    """What a program here sends to a server."""
    if plan.mode == "tproxy" and plan.outbound:
        yield _nft_to_lo(plan, f"tcp dport {ports(plan.outbound)}", plan.marks.outbound)


def nft_from_lo(plan: Plan) -> Iterator[nft_words.Rule]:
    """Whose it is, once it comes in from lo."""
    if plan.speaks_here:
        match = f"{is_marked(plan, 'meta mark', plan.marks.outbound)} ct state new {nft_words.NOT_SYN}"
        yield nft_words.Rule(f"{match} socket transparent 1 counter accept", _OURS)
        direct = set_mark(plan, "ct mark", plan.marks.inbound | plan.marks.outbound)
        yield nft_words.Rule(f"{match} {direct} counter drop", _DIRECT)


def _nft_to_lo(plan: Plan, match: str, mark: int) -> nft_words.Rule:
    first = f"ct state new {is_marked(plan, 'ct mark', 0)} {nft_words.NOT_SYN} {match}"
    marks = f"{set_mark(plan, 'ct mark', mark)} {set_mark(plan, 'meta mark', plan.marks.outbound)}"
    return nft_words.Rule(f"{first} {marks} counter accept", _LABEL)


def iptables_of_servers(plan: Plan) -> Iterator[iptables_words.Rule]:
    """The same as nft_of_servers; the rules that follow send what is so marked to lo."""
    if plan.inbound and plan.keeps_source:
        match = f"{_iptables_first(plan)} -m mark --mark {bits(plan, 0)} -m addrtype ! --dst-type LOCAL"
        yield from by_ports(match, plan.inbound, _mark(plan, plan.marks.relay), _LABEL, "--sports")


def iptables_of_programs(plan: Plan) -> Iterator[iptables_words.Rule]:
    """The same as nft_of_programs; the rules that follow send what is so marked to lo."""
    if plan.mode == "tproxy":
        yield from by_ports(_iptables_first(plan), plan.outbound, _mark(plan, plan.marks.outbound), _LABEL)


def iptables_from_lo(plan: Plan) -> Iterator[iptables_words.Rule]:
    """The same as nft_from_lo."""
    if plan.speaks_here:
        outbound = f"-m mark --mark {bits(plan, plan.marks.outbound)}"
        match = f"{iptables_words.NOT_SYN} {outbound} -m conntrack --ctstate NEW"
        yield iptables_words.Rule(f"{match} -m socket --transparent", "-j ACCEPT", _OURS)
        yield iptables_words.Rule(match, _mark(plan, plan.marks.inbound | plan.marks.outbound), _DIRECT)
        yield iptables_words.Rule(match, "-j DROP", _DIRECT)


def _iptables_first(plan: Plan) -> str:
    return f"{iptables_words.NOT_SYN} -m conntrack --ctstate NEW -m connmark --mark {bits(plan, 0)}"


def _mark(plan: Plan, mark: int) -> str:
    return f"-j CONNMARK --set-xmark {bits(plan, mark)}"
