"""The ways of packets of relayed connections through the rules of others: where they pass, and with which marks.

Only what decides is here. A packet from lo keeps the route that it got when it was sent, so a mark that is lost there
after the relay's rules is of no consequence; nor is one that a packet for this host itself loses when it arrives.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tproxy_relay.check import firewall, kernel
from tproxy_relay.check.context import Case
from tproxy_relay.check.firewall import Chain, Packet
from tproxy_relay.intercept.plan import Family
from tproxy_relay.net import proc_net
from tproxy_relay.settings import PortRange

MANGLE, NAT = -150, -100
"""linux/netfilter_ipv4.h, nf_ip_hook_priorities: where the relay's rules are."""
CONNTRACK = -200
"""From here on a connection is tracked."""


class Station(NamedTuple):
    """The chains of a hook that a packet passes, by their priority."""

    hook: str
    first: int
    last: int

    def chains(self, case: Case, packet: Packet) -> Iterator[tuple[Chain, Mapping[str, Chain]]]:
        """Those of others, in no order, each with the chains of its table."""
        for kind in ("filter", "route", "nat"):
            for chain, table in firewall.base_chains(case.firewall, self.hook, kind, packet.family):
                if self.first <= chain.priority <= self.last:
                    yield chain, table


class Journey(NamedTuple):
    """A packet, where it passes, and what it takes along."""

    what: str
    packet: Packet
    keeps: tuple[Station, ...] = ()
    """Where its mark is not to be lost."""
    remembers: tuple[Station, ...] = ()
    """Where the mark of its connection is not to be lost."""
    tracked: tuple[Station, ...] = ()
    """Where its connection is to be tracked."""
    meets: tuple[Station, ...] = ()
    """Filters that only relayed connections meet like this."""
    fatal: int = 0
    """Only these bits of the mark do harm, if it gets them; 0: any other mark does."""
    in_floods: bool = False
    """True if it goes without tracking, but for handshakes that are answered with a SYN cookie."""


_EARLY, _LATE = ALWAYS = -(2**31), 2**31
_BEFORE, _AFTER = (_EARLY, MANGLE), (MANGLE, _LATE)
_RAW = (_EARLY, CONNTRACK - 1)
_OUTPUT, _RAW_OUTPUT = Station("output", _EARLY, _LATE), Station("output", *_RAW)
_RAW_PREROUTING = Station("prerouting", *_RAW)
_POSTROUTING, _PREROUTING = Station("postrouting", _EARLY, _LATE), Station("prerouting", _EARLY, _LATE)
_ARRIVING_AT_LO = (_PREROUTING, Station("input", _EARLY, _LATE))
_AFTER_US = Station("prerouting", MANGLE + 1, _LATE)
"""Where the packet has its socket already; at the same priority that is not certain."""


@functools.lru_cache(maxsize=1)
def of(case: Case) -> list[Journey]:
    """All that there are with these settings, the first packets first."""
    return [journey for family in case.plan.families for journey in _of_family(case, family)]


def _of_family(case: Case, family: Family) -> Iterator[Journey]:
    plan = case.plan
    if plan.mode == "redirect":
        yield from _redirected(case, family)
        return
    for ports in plan.inbound:
        yield from _inbound(case, family, ports)
        if plan.keeps_source and served_here(ports):
            yield from _to_servers_here(case, family, ports)
    for ports in plan.outbound:
        yield from _outbound(case, family, ports)
    for ports in (*plan.inbound, *plan.outbound):
        yield from _of_relay(case, family, ports)


def served_here(ports: PortRange) -> bool:
    """True if a program of this host listens on one of them."""
    return any(one.listening and ports.first <= one.local_port <= ports.last for one in proc_net.tcp_sockets())


def _inbound(case: Case, family: Family, ports: PortRange) -> Iterator[Journey]:
    """For a server beyond this host; others are delivered here whatever their mark is."""
    marks, after = case.plan.marks, Station("prerouting", *_AFTER)
    packet = Packet(family, ports.first, marks.inbound, case.plan.mark_mask, None, None, ct_mark=0)
    beyond = not served_here(ports)
    answer = packet._replace(port=None, sport=ports.first, mark=marks.relay, state="established")
    yield Journey(f"connections to port {ports}", packet, tracked=(_RAW_PREROUTING,), in_floods=True)
    yield Journey(f"the relay's answers from port {ports}", answer, tracked=(_RAW_OUTPUT,), in_floods=True)
    what = f"connections to port {ports} on their way to the relay"
    for interface in _interfaces(case, family):
        arriving = packet._replace(iif=interface)
        for state, ct_mark in (("new", 0), ("established", None)):
            one = arriving._replace(state=state, ct_mark=ct_mark)
            yield Journey(what, one, keeps=(after,) * beyond, meets=(after,))
        if case.plan.keeps_source and beyond:
            answer = arriving._replace(port=None, sport=ports.first, state="established")
            yield Journey(f"answers of servers from port {ports} to the relay", answer, keeps=(after,), meets=(after,))


def _outbound(case: Case, family: Family, ports: PortRange) -> Iterator[Journey]:
    marks = case.plan.marks
    packet = Packet(family, ports.first, marks.outbound, case.plan.mark_mask, None, None, ct_mark=marks.outbound)
    on_lo = packet._replace(iif="lo")
    output, arriving = Station("output", *_AFTER), Station("prerouting", *_BEFORE)
    what = f"connections to port {ports} of programs here"
    yield Journey(what, packet, tracked=(_RAW_OUTPUT,))
    for state in ("new", "established"):
        yield Journey(what, packet._replace(state=state), keeps=(output,), remembers=(output,))
        yield Journey(what, packet._replace(state=state, oif="lo"), remembers=(_POSTROUTING,))
        yield Journey(what, on_lo._replace(state=state), (arriving,), _ARRIVING_AT_LO, meets=(arriving,))
    yield Journey(what, on_lo._replace(way_back=_way_back(case)), meets=(_AFTER_US,))
    answer = packet._replace(port=None, sport=ports.first, mark=marks.relay, oif="lo", state="established")
    what = f"the relay's answers to programs here, from port {ports}"
    leaving, nft = (_OUTPUT, _POSTROUTING), case.backend == "nft"  # those of iptables let pass what has a socket here
    yield Journey(what, answer, (_OUTPUT,) * nft, leaving, (_RAW_OUTPUT,), fatal=marks.outbound)
    answer = answer._replace(iif="lo", oif=None)
    yield Journey(what, answer, (arriving,) * nft, _ARRIVING_AT_LO, meets=(_PREROUTING,), fatal=marks.outbound)


def _of_relay(case: Case, family: Family, ports: PortRange) -> Iterator[Journey]:
    """Its own connections. If they lose their mark before the rules for programs here, those take them: a loop."""
    plan = case.plan
    if not any(one.first <= ports.first <= one.last for one in plan.outbound) or plan.exempt_uid is not None:
        return
    packet = Packet(family, ports.first, plan.marks.relay, plan.mark_mask, None, None, ct_mark=0)
    before = Station("output", _EARLY, NAT if plan.mode == "redirect" else MANGLE)
    yield Journey(f"the relay's own connections to port {ports}", packet, keeps=(before,))


def _to_servers_here(case: Case, family: Family, ports: PortRange) -> Iterator[Journey]:
    """With the client's address as their source: answers find the way back by the mark of the connection."""
    marks = case.plan.marks
    packet = Packet(family, ports.first, marks.relay, case.plan.mark_mask, None, "lo", ct_mark=0)
    arriving, what = Station("prerouting", *_BEFORE), f"the relay's own connections to port {ports} of this host"
    yield Journey(what, packet, keeps=(_OUTPUT,), tracked=(_RAW_OUTPUT,))
    yield Journey(what, packet._replace(iif="lo", oif=None), keeps=(arriving,), meets=(_PREROUTING,))
    what = f"answers of port {ports} of this host on their way to the relay"
    answer = packet._replace(port=None, sport=ports.first, state="established", ct_mark=marks.relay, oif=None)
    yield Journey(what, answer._replace(mark=0), remembers=(_OUTPUT,), tracked=(_RAW_OUTPUT,))
    answer = answer._replace(mark=marks.outbound)
    yield Journey(what, answer, keeps=(Station("output", *_AFTER),))
    if case.plan.outbound:  # else it gets no socket there
        yield Journey(what, answer._replace(iif="lo", way_back=_way_back(case)), meets=(_AFTER_US,))


def _redirected(case: Case, family: Family) -> Iterator[Journey]:
    """Addresses are rewritten for connections that are tracked."""
    plan = case.plan
    for hook, ranges, words in (
        ("prerouting", plan.inbound, "connections to port {}"),
        ("output", plan.outbound, "connections to port {} of programs here"),
    ):
        for ports in ranges:
            packet = Packet(family, ports.first, 0, plan.mark_mask, plan.interface, None, ct_mark=0)
            yield Journey(words.format(ports), packet, tracked=(Station(hook, *_RAW),))
    for ports in plan.outbound:
        yield from _of_relay(case, family, ports)


def _way_back(case: Case) -> bool | None:
    """Of what came in by lo and has its socket: newer kernels do not find one. Tried only if somebody asks for it."""
    rules = [rule for _, rule in firewall.all_rules(case.firewall)]
    if not any(condition.kind == "way_back" for rule in rules for condition in rule.conditions):
        return None
    return kernel.way_back_from_lo(case)


def _interfaces(case: Case, family: Family) -> list[str | None]:
    """By which they may come in: one by one, because a rule may be about one."""
    if case.plan.interface:
        return [case.plan.interface]
    return [one.name for one in case.host.interfaces if one.name != "lo" and one.up and one.has(family)] or [None]
