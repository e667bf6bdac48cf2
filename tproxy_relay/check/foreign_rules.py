"""Others who use what the ruleset uses: its routing table, its priorities, its bits of the mark, its packets.

What belongs to somebody else is not taken away by a remedy, if other settings can keep clear of it.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from tproxy_relay.check import firewall
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, problem, warning
from tproxy_relay.check.firewall import ALL_BITS, Packet, Rule
from tproxy_relay.check.journeys import ALWAYS, Station
from tproxy_relay.intercept import foreign_routing, routing
from tproxy_relay.intercept.plan import Family
from tproxy_relay.settings import PortRange

_MATCH_ALL = {"priority", "src", "fwmark", "fwmask", "not", "table", "action", "protocol", "suppress_prefixlen"}
"""What a rule of routing may say without being about some addresses or ports only."""


def probe_routing_table(case: Case) -> Iterator[Finding]:
    """Our table must be empty, but for our own route."""
    if not (case.intercepts and case.plan.needs_routing):
        return
    found = False
    for family in case.plan.families:
        for destination in routing.foreign_routes(case.plan, family)[:1]:
            found = True
            yield problem(
                f"route-table-ipv{family}",
                f"routing table {case.plan.route_table} has somebody else's route to {destination}",
                "the relay needs a table of its own, and does not start with this one",
                case.command(route_table=_free_table(case)),
            )
    if not found:
        yield ok("route-table", f"routing table {case.plan.route_table} is free")


def probe_rule_priority(case: Case) -> Iterator[Finding]:
    """Rules of routing that stand before ours and send our packets elsewhere."""
    if not (case.intercepts and case.plan.needs_routing):
        return
    found = False
    for family in case.plan.families:
        before = [
            one
            for one in _foreign_rules(case, family)
            if one["priority"] <= case.plan.route_priority + 2 and _diverts(case, family, one)
        ]
        for one in sorted(before, key=lambda one: _is_narrow(case, one))[:1]:
            found = True
            what = f"IPv{family} rule of routing {one['priority']} comes before the relay's ({_shown(one)})"
            why = "intercepted packets that it matches never reach the relay"
            first = min(rule["priority"] for rule in _foreign_rules(case, family) if rule["priority"] > 0)
            if first > 3:
                remedy = case.command(route_priority=first - 3)
            else:
                remedy = f"ip -{family} rule del pref {one['priority']}"
            make = warning if _is_narrow(case, one) else problem
            yield make(f"rule-priority-ipv{family}", what, why, remedy)
    if not found:
        yield ok("rule-priority", f"no rule of routing before {case.plan.route_priority} takes the relay's packets")


def probe_marks(case: Case) -> Iterator[Finding]:
    """Somebody else who sets, or acts on, the bits that are ours."""
    if not case.intercepts:
        return
    mask = case.plan.mark_mask
    uses = [(value, used, where) for value, used, where in _uses_of_marks(case) if used]
    clashes = [where for value, used, where in uses if value & used & mask]
    if clashes:
        taken = 0
        for value, used, _ in uses:
            taken |= value | (0 if used == ALL_BITS else used)
        yield problem(
            "marks",
            f"{clashes[0]} uses bits of mark-mask {mask:#010x}",
            "packets of the one would be taken for packets of the other",
            case.command(mark_mask=free_mask(taken)) if free_mask(taken) else "",
        )
    else:
        yield ok("marks", f"nobody else uses the bits {mask:#010x} of the mark")


def probe_other_proxies(case: Case) -> Iterator[Finding]:
    """Rules that would take the same connections to another listener. Whether they do is not certain of those that are
    about some addresses only, as those for the services of Kubernetes are."""
    found = sorted(_other_proxies(case), key=lambda one: not one[-1])
    for rule, ports, remedy, certain in found[:1]:
        if certain:
            yield problem(
                "other-proxy",
                f"{rule.where} takes connections to port {ports} too",
                "whichever rule comes first has them, and the other program has none",
                remedy,
            )
        else:
            yield warning(
                "other-proxy",
                f"{rule.where} may take some connections to port {ports}",
                "whichever rule comes first has those",
            )


def _other_proxies(case: Case) -> Iterator[tuple[Rule, PortRange, str, bool]]:
    """Each rule with the ports, the command that lets them pass by it, and whether it takes them for certain."""
    plan = case.plan
    actions = {"tproxy"} if plan.mode == "tproxy" else {"tproxy", "redirect", "dnat"}
    for hook, ranges in (("prerouting", plan.inbound), ("output", plan.outbound if plan.mode == "redirect" else ())):
        for family, ports in itertools.product(plan.families, ranges):
            packet = _packet(case, family, ports, 0, iif=plan.interface)
            for chain, table in Station(hook, *ALWAYS).chains(case, packet):
                for rule, certain in firewall.met(chain, table, packet):
                    if rule.action in actions:
                        words = "tcp dport {}" if chain.is_of_nft else "-p tcp --dport {}"
                        listed = str(ports) if chain.is_of_nft else str(ports).replace("-", ":")
                        yield rule, ports, chain.let_pass(words.format(listed)), certain


def probe_masquerade(case: Case) -> Iterator[Finding]:
    """NAT gives the relay's connections this host's address, whatever source they had."""
    plan = case.plan
    if not (plan.inbound and plan.keeps_source):
        return
    for family in plan.families:
        packet = _packet(case, family, plan.inbound[0], plan.marks.relay, iif=None)
        for rule, certain in firewall.rewrites_source(case.firewall, packet):
            yield (problem if certain else warning)(
                "masquerade",
                f"{rule.where} rewrites the source of connections to port {packet.port}",
                f"servers see this host in spite of preserve-source {plan.preserve_source}; if they can answer "
                f"clients through here, let the mark {plan.marks.relay:#x}/{plan.mark_mask:#x} pass before it",
                case.command(preserve_source="no"),
            )
            return
    yield ok("masquerade", "no rule rewrites the preserved source")


def free_mask(taken: int) -> int:
    """Three neighbouring bits that nobody has, from the top down; 0 if there are none."""
    return next((0b111 << shift for shift in range(28, -1, -1) if not 0b111 << shift & taken), 0)


def _packet(case: Case, family: Family, ports: PortRange, mark: int, *, iif: str | None) -> Packet:
    return Packet(family, ports.first, mark, case.plan.mark_mask, iif, None)


def _foreign_rules(case: Case, family: Family) -> list[dict[str, Any]]:
    return foreign_routing.foreign(case.host.rules_of_routing(family))


def _diverts(case: Case, family: Family, one: dict[str, Any]) -> bool:
    return foreign_routing.diverts(case.plan, one, lambda table: case.host.routes(family, table))


def _is_narrow(case: Case, one: dict[str, Any]) -> bool:
    """True if it is about some packets only, or perhaps about none of ours."""
    about_some = bool(set(one) - _MATCH_ALL) or one.get("src") != "all"
    return about_some or foreign_routing.is_for_bits_of_others(case.plan, one)


def _uses_of_marks(case: Case) -> Iterator[tuple[int, int, str]]:
    """Value, mask and place of each mark in somebody else's rules."""
    for family in case.plan.families:
        for one in _foreign_rules(case, family):
            if "fwmark" in one:
                value, mask = foreign_routing.fwmark(one)
                yield value, mask, f"IPv{family} rule of routing {one['priority']} ({_shown(one)})"
    for _, rule in firewall.all_rules(case.firewall):
        for value, mask in rule.marks:
            yield value, mask, rule.where


def _free_table(case: Case) -> int:
    table = case.plan.route_table + 1
    while any(case.host.routes(family, str(table)) for family in case.plan.families):
        table += 1
    return table


def _shown(one: dict[str, Any]) -> str:
    return " ".join(
        f"{key} {value}".strip() for key, value in one.items() if key != "priority" and (key, value) != ("src", "all")
    )
