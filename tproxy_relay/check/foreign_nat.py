"""NAT of others that comes before the relay's own: it gives packets that have their socket by then another destination.

With nft the relay's chain comes first, whoever else has one. Those of iptables have one priority for all, and the one
that was there first is first, but for rules in the same table: there ours are in front.
"""

from collections.abc import Iterator

from tproxy_relay.check import firewall
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, problem
from tproxy_relay.check.firewall import Chain, Packet
from tproxy_relay.check.journeys import NAT
from tproxy_relay.intercept.plan import Family

_REWRITES = frozenset({"dnat", "redirect"})


def probe_nat(case: Case) -> Iterator[Finding]:
    """Rules that rewrite where connections go that the relay has taken: the clients are connected, and hear nothing."""
    plan = case.plan
    if not plan.beside_nat:
        return
    seen = set()
    for family in plan.families:
        for ports in plan.inbound:
            packet = Packet(family, ports.first, plan.marks.inbound, plan.mark_mask, plan.interface, None)
            for chain, table in firewall.base_chains(case.firewall, "prerouting", "nat", family):
                if chain.title in seen or not _comes_first(case, chain, family):
                    continue
                for rule, _ in firewall.met(chain, table, packet):
                    if rule.action in _REWRITES and chain.title not in seen:
                        seen.add(chain.title)
                        yield problem(
                            "nat",
                            f"{rule.where} rewrites where connections to port {ports} go, before the relay's rules",
                            "clients of the relay are connected, and then hear nothing",
                            chain.insert(plan.marks.inbound),
                        )
    if not seen:
        yield ok("nat", "the destinations of relayed connections are kept from the NAT of others")


def _comes_first(case: Case, chain: Chain, family: Family) -> bool:
    if case.backend == "nft":
        return chain.priority < NAT
    program = case.backend if family == 4 else case.backend.replace("iptables", "ip6tables")
    return chain.priority <= NAT and not chain.title.startswith(f"{program} ")
