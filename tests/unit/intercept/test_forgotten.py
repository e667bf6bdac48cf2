"""Which rules there are for connections that conntrack has forgotten. e2e/test_conntrack_flush.py sends packets."""

from dataclasses import replace

from plans import PLAN, every_plan

from tproxy_relay.intercept import forgotten
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.settings import PortRange

PORTS = (PortRange(80, 80),)


@every_plan
def test_both_kinds_of_rules_are_made_for_the_same_plans(plan: Plan, state: State) -> None:
    for nft, iptables in (
        (forgotten.nft_of_servers, forgotten.iptables_of_servers),
        (forgotten.nft_of_programs, forgotten.iptables_of_programs),
        (forgotten.nft_from_lo, forgotten.iptables_from_lo),
    ):
        assert [rule.label for rule in nft(plan)] == list(dict.fromkeys(rule.label for rule in iptables(plan)))


@every_plan
def test_what_is_sent_to_lo_is_looked_at_there(plan: Plan, state: State) -> None:
    sent = [*forgotten.nft_of_servers(plan), *forgotten.nft_of_programs(plan)]
    looks = list(forgotten.nft_from_lo(plan))
    assert bool(sent) == bool(looks) == plan.speaks_here
    if looks:
        assert "socket transparent 1" in looks[0].text and looks[0].text.endswith("accept")
        assert looks[-1].text.endswith("drop")


def test_where_nobody_here_is_spoken_to_nothing_is_added() -> None:
    for plan in (
        replace(PLAN, inbound=PORTS, outbound=(), preserve_source="no"),
        replace(PLAN, mode="redirect", inbound=PORTS, outbound=PORTS, preserve_source="no"),
    ):
        made = (forgotten.nft_of_servers, forgotten.nft_of_programs, forgotten.nft_from_lo)
        assert not [rule for rules in made for rule in rules(plan)]
