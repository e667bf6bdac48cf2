"""What the rules of others do to packets of relayed connections on their way: drop them, change their marks, keep their
connections from being tracked, rewrite where they go.

The remedy leaves the other program its rule: it spares the relay's packets, or its bits of the mark.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from tproxy_relay.check import firewall, journeys
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, problem, warning
from tproxy_relay.check.firewall import Chain, Change, Packet, Rule
from tproxy_relay.check.journeys import ALWAYS, MANGLE, Journey, Station
from tproxy_relay.intercept.plan import Family
from tproxy_relay.settings import PortRange

_UNKNOWN = (
    "the relay knows such packets by the mark of their connection: without it they go direct, are reset or hang"
)
_FLOOD = (
    "a handshake that is answered with a SYN cookie (in a flood, or with tcp_syncookies 2) is known by its connection "
    "only: such clients are reset"
)


def probe_filters(case: Case) -> Iterator[Finding]:
    """Intercepted packets still have their original port when they meet the filters of this host, and come in by lo
    where they were sent by programs here."""
    if not case.intercepts or case.plan.mode != "tproxy":
        return
    seen = set()
    for what, station, packet, bits in _filtered(case):
        for chain, table in station.chains(case, packet):
            decision, by = firewall.verdict(chain, table, packet)
            if decision == firewall.DROP and chain.title not in seen:
                seen.add(chain.title)
                yield problem(
                    "filter",
                    f"{by} drops {what}",
                    "such packets keep their original port, and are to be let in by their mark",
                    chain.insert(bits),
                )
    if not seen:
        yield ok("filter", "no filter of this host drops relayed connections for certain")


def probe_lost_marks(case: Case) -> Iterator[Finding]:
    """Rules that write whole marks, of packets or of connections, and so lose the relay's."""
    found = _losses(case)
    for loss in found:
        whose = "the mark of" if loss.what == "mark" else "the mark of the connection of"
        why = "without it the kernel does not take them to the relay: they hang, go direct or come round again"
        if loss.maybe:
            why += f" ({loss.maybe})"
        remedy = loss.rule.spare(loss.bits, case.plan.mark_mask)
        make = warning if loss.maybe else problem
        yield make("lost-marks", f"{loss.rule.where} takes away {whose} {loss.whose}", why, remedy)
    if case.intercepts and not found:
        yield ok("lost-marks", "no rule takes the relay's bits from marks for certain")


def probe_tracking(case: Case) -> Iterator[Finding]:
    """Rules that keep connections from being tracked."""
    seen = set()
    for journey in journeys.of(case):
        packet = journey.packet
        for station in journey.tracked:
            for chain, table in station.chains(case, packet):
                for rule, certain in firewall.met(chain, table, packet):
                    if not (certain and rule.untracks) or (rule.where, journey.what) in seen:
                        continue
                    seen.add((rule.where, journey.what))
                    make, why = (warning, _FLOOD) if journey.in_floods else (problem, _UNKNOWN)
                    condition = _in_words(case, journey, nft=chain.is_of_nft)
                    what = f"{rule.where} leaves {journey.what} untracked"
                    yield make("tracking", what, why, chain.let_pass(condition))
    if not seen and any(journey.tracked for journey in journeys.of(case)):
        yield ok("tracking", "no rule keeps relayed connections from being tracked for certain")


def probe_redirects(case: Case) -> Iterator[Finding]:
    """Rules that send to this host what programs here send, the relay among them."""
    for what, packet in _sent(case):
        for chain, table in Station("output", MANGLE + 1, ALWAYS[1]).chains(case, packet):
            for rule, certain in firewall.met(chain, table, packet):
                if certain and rule.action == "redirect":
                    yield problem(
                        "other-proxy",
                        f"{rule.where} takes {what}",
                        "they come to another program of this host, or to the relay with an address that it denies",
                        chain.insert(case.plan.marks.outbound | case.plan.marks.relay),
                    )
                    return


def probe_synproxy(case: Case) -> Iterator[Finding]:
    """SYNPROXY in input answers SYNs in the relay's place. It is for packets that are not tracked."""
    seen = set()
    for what, station, packet, bits in _filtered(case):
        if station.hook != "input":
            continue
        packet = packet._replace(state="untracked")
        for chain, table in station.chains(case, packet):
            for rule, certain in firewall.met(chain, table, packet):
                if rule.action == "synproxy" and rule.where not in seen:
                    seen.add(rule.where)
                    make = problem if certain else warning
                    why = "clients are connected to the kernel's SYNPROXY, and nothing is relayed"
                    remedy = chain.insert(bits)
                    yield make("synproxy", f"{rule.where} answers {what}", why, remedy)


def _sent(case: Case) -> Iterator[tuple[str, Packet]]:
    """The first packets that leave here for the servers, and those that the relay takes before they leave."""
    plan = case.plan
    for family in plan.families:
        for ports in plan.inbound:
            packet = _packet(case, family, ports, plan.marks.relay, iif=None)
            yield f"the relay's own connections to port {ports}", packet
        for ports in plan.outbound if plan.mode == "tproxy" else ():
            packet = _packet(case, family, ports, plan.marks.outbound, iif=None)
            yield f"connections of programs here to port {ports} too", packet


@dataclass
class _Loss:
    """A rule that loses marks."""

    rule: Rule
    what: str
    """mark or ct_mark."""
    whose: str
    bits: int = 0
    """Those of the packets that lose them."""
    orders: set[str] = field(default_factory=set)
    """Where it has to come for that, seen from the relay's rules: before, after, '' where that is certain."""
    everywhere: bool = False
    """True if it does not matter by which interface they come in."""
    interfaces: set[str] = field(default_factory=set)

    @property
    def maybe(self) -> str:
        """When it is so, if it is not always; else ''."""
        if len(self.orders) == 1 and "" not in self.orders:
            return f"while its chain comes {[*self.orders][0]} the relay's, which has the same priority"
        return "" if self.everywhere else f"for what comes in by {', '.join(sorted(self.interfaces))}"


def _losses(case: Case) -> list[_Loss]:
    found: dict[tuple[str, str], _Loss] = {}
    ways: dict[tuple[object, ...], set[str | None]] = {}
    for journey in journeys.of(case):
        ways.setdefault(_group(journey), set()).add(journey.packet.iif)
    lost: dict[tuple[object, ...], set[str | None]] = {}
    for journey in journeys.of(case):
        for what, rule, order in _losers(case, journey):
            one = found.setdefault((rule.where, what), _Loss(rule, what, journey.what))
            one.bits |= journey.packet.mark
            one.orders.add(order)
            one.interfaces.add(str(journey.packet.iif))
            by = lost.setdefault((rule.where, what, *_group(journey)), set())
            by.add(journey.packet.iif)
            one.everywhere = one.everywhere or by == ways[_group(journey)]
    return [*found.values()]


def _group(journey: Journey) -> tuple[object, ...]:
    """What is the same of packets that differ in the interface that they come in by."""
    return (journey.what, journey.keeps, journey.remembers, journey.packet._replace(iif=None))


def _losers(case: Case, journey: Journey) -> Iterator[tuple[str, Rule, str]]:
    """The rules that take a mark from this packet or its connection for certain: which, and in which order."""
    packet = journey.packet
    for what, stations, wanted in (
        ("mark", journey.keeps, packet.mark),
        ("ct_mark", journey.remembers, packet.ct_mark),
    ):
        for station in stations:
            for chain, table in station.chains(case, packet):
                order = _order(case, station, chain)
                if order is None:
                    continue
                for rule, certain in firewall.met(chain, table, packet):
                    if any(value & mask & packet.mask for value, mask in rule.marks):
                        continue  # it means these very bits: others are to be chosen (foreign_rules.probe_marks)
                    for change in rule.changes if certain else ():
                        if change.what == what and _loses(change, packet, wanted, journey.fatal):
                            yield what, rule, order


def _loses(change: Change, packet: Packet, wanted: int | None, fatal: int) -> bool:
    if not change.certain:
        return False
    if change.of_ct_mark & packet.mask and packet.ct_mark is None:
        return False  # nobody knows
    left = change.bits(packet)
    if fatal and change.what == "mark":
        return left is not None and bool(left & fatal)
    return left != wanted


def _order(case: Case, station: Station, chain: Chain) -> str | None:
    """Which order it takes for the packet to come by there: '' if it does so for certain, None if it does not."""
    if chain.priority != MANGLE or MANGLE not in (station.first, station.last):
        return ""
    program = chain.title.split()[0].replace("ip6tables", "iptables")
    if program.startswith(case.backend) and case.backend.startswith("iptables"):
        return "" if station.first == MANGLE else None  # the relay's rules are the first ones of this very chain
    return "after" if station.first == MANGLE else "before"


def _filtered(case: Case) -> Iterator[tuple[str, Station, Packet, int]]:
    """The filters that a relayed connection meets: what it is there, where, its packet, and by which bits of the mark
    it can be let in."""
    plan, entry, exit_ = case.plan, Station("input", *ALWAYS), Station("output", *ALWAYS)
    for family in plan.families:
        for ports in plan.inbound:
            packet = _packet(case, family, ports, plan.marks.inbound, iif=plan.interface)
            yield f"connections to port {ports} on their way to the relay", entry, packet, plan.mark_mask
        for ports in plan.outbound:
            packet = _packet(case, family, ports, plan.marks.outbound, iif="lo")
            what = f"connections to port {ports} of programs here, on their way to the relay"
            yield what, entry, packet, plan.mark_mask
        for ports in (*plan.inbound, *plan.outbound):
            packet = _packet(case, family, ports, plan.marks.relay, iif=None)
            yield f"the relay's own connections to port {ports}", exit_, packet, plan.mark_mask
    for journey in journeys.of(case):
        for station in journey.meets:
            yield journey.what, station, journey.packet, journey.packet.mark


def _packet(case: Case, family: Family, ports: PortRange, mark: int, *, iif: str | None) -> Packet:
    return Packet(family, ports.first, mark, case.plan.mark_mask, iif, None)


def _in_words(case: Case, journey: Journey, *, nft: bool) -> str:
    """The condition that this journey's packets fulfil, and none that others may keep untracked: by port and mark."""
    plan, packet = case.plan, journey.packet
    ranges = plan.outbound if plan.marks.outbound in (packet.mark, packet.ct_mark) else plan.inbound
    word = "dport" if packet.port else "sport"
    of_relay = packet.mark == plan.marks.relay
    if nft:
        listed = ", ".join(map(str, ranges))
        return f"meta mark & {plan.marks.relay:#010x} {'!=' if of_relay else '=='} 0 tcp {word} {{ {listed} }}"
    listed = ",".join(str(one).replace("-", ":") for one in ranges)
    mark = f"{'! ' if of_relay else ''}--mark 0x0/{plan.marks.relay:#x}"
    return f"-p tcp -m multiport --{word}s {listed} -m mark {mark}"
