"""Others who use what the ruleset uses, in a network of the test's own."""

import shlex

import pytest
from doctor import PORT, case, levels

from tproxy_relay.check import foreign_rules
from tproxy_relay.intercept import programs

in_network = pytest.mark.usefixtures("network")


@pytest.mark.parametrize("taken", [0, 0xE0000000, 0x0F000000, 0xFFFFFFF8, 0x55555550])
def test_a_free_mask_has_three_bits_of_nobody(taken: int) -> None:
    mask = foreign_rules.free_mask(taken)
    assert mask & taken == 0 and mask.bit_count() == (0 if taken == 0x55555550 and not mask else 3)


def test_no_mask_is_free_when_all_bits_are_taken() -> None:
    assert foreign_rules.free_mask(0xFFFFFFFE) == 0


@in_network
def test_somebody_elses_route_in_our_table() -> None:
    assert levels([*foreign_rules.probe_routing_table(case())]) == [("route-table", "ok")]
    programs.run("ip route add 192.0.2.0/24 dev lo table 7006".split())
    (found,) = foreign_rules.probe_routing_table(case())
    assert (found.name, found.level) == ("route-table-ipv4", "problem") and "192.0.2.0/24" in found.what
    assert found.remedy.endswith("--route-table 7007")
    assert levels([*foreign_rules.probe_routing_table(case(route_table=7007))]) == [("route-table", "ok")]


@in_network
def test_rules_of_routing_that_come_before_ours() -> None:
    assert levels([*foreign_rules.probe_rule_priority(case())]) == [("rule-priority", "ok")]
    programs.run("ip route add default dev lo table 100".split())
    programs.run("ip rule add pref 100 lookup 100".split())
    (found,) = foreign_rules.probe_rule_priority(case())
    assert (found.name, found.level) == ("rule-priority-ipv4", "problem")
    assert found.remedy.endswith("--route-priority 97")
    assert levels([*foreign_rules.probe_rule_priority(case(route_priority=97))]) == [("rule-priority", "ok")]
    programs.run("ip rule del pref 100".split())
    programs.run("ip rule add pref 100 from 192.0.2.1 lookup 100".split())
    assert [one.level for one in foreign_rules.probe_rule_priority(case())] == ["warning"], "of some packets only"


@in_network
def test_rules_of_routing_for_bits_of_others_are_no_problem() -> None:
    """Tailscale's: whether our packets have those bits is not known. Ours go before them all the same, if they may."""
    programs.run("ip route add default dev lo".split())
    for pref, rule in ((3, "fwmark 0x80000/0xff0000"), (5210, "fwmark 0x1000/0x4001000")):
        programs.run(f"ip rule add pref {pref} {rule} lookup main".split())
    assert [one.level for one in foreign_rules.probe_rule_priority(case())] == ["warning"]
    for rule in ("not fwmark 0xca6c", "not fwmark 0x80000/0xff0000", "fwmark 0/0xff0000"):
        programs.run(f"ip rule add pref 100 {rule} lookup main".split())
        (found,) = foreign_rules.probe_rule_priority(case())
        assert found.level == "problem" and "rule of routing 100 " in found.what, "for certain is worse than perhaps"
        programs.run("ip rule del pref 100".split())


@in_network
def test_bits_of_the_mark_that_somebody_uses() -> None:
    assert levels([*foreign_rules.probe_marks(case())]) == [("marks", "ok")]
    programs.run("ip rule add pref 9000 fwmark 0x1000000/0x1000000 lookup main".split())
    (found,) = foreign_rules.probe_marks(case())
    assert found.level == "problem" and "IPv4 rule of routing 9000" in found.what
    mask = int(found.remedy.split("--mark-mask ")[1], 0)
    assert levels([*foreign_rules.probe_marks(case(mark_mask=mask))]) == [("marks", "ok")]


@in_network
def test_another_proxy_is_named() -> None:
    assert not [*foreign_rules.probe_other_proxies(case())]
    chain = "chain c { type filter hook prerouting priority mangle; tcp dport 8000 meta mark set 1 tproxy to :1; }"
    programs.run(["nft", "-f", "-"], f"table inet somebodys {{ {chain}; }}")
    (found,) = foreign_rules.probe_other_proxies(case())
    assert found.level == "problem"
    programs.run(shlex.split(found.remedy))
    assert not [*foreign_rules.probe_other_proxies(case())]
    assert "tproxy to" in programs.run("nft list ruleset".split()).stdout, "it is somebody else's"


KUBE_PROXY = """*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:KUBE-SEP-A - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "kubernetes:https" -m tcp --dport 8000 -j KUBE-SVC-A
-A KUBE-SVC-A -j KUBE-SEP-A
-A KUBE-SEP-A -s 10.244.0.2/32 -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-A -p tcp -m comment --comment "default/kubernetes:https" -m tcp -j DNAT --to-destination 10.244.0.2:6443
COMMIT
"""


@in_network
@pytest.mark.parametrize("program", ["iptables-nft-restore", "iptables-legacy-restore"])
@pytest.mark.parametrize("mode, levels", [("redirect", ["warning"]), ("tproxy", [])])
def test_services_of_kubernetes_are_left_alone(program: str, mode: str, levels: list[str]) -> None:
    """They take what goes to addresses of their own."""
    programs.run([program], KUBE_PROXY)
    for direction in ({}, {"intercept_inbound": (), "intercept_outbound": (PORT,)}):
        found = [*foreign_rules.probe_other_proxies(case(mode=mode, **direction))]
        assert [one.level for one in found] == levels and not any(one.remedy for one in found)


@in_network
@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
def test_another_redirect_lets_the_relays_ports_pass(program: str) -> None:
    rule = f"{program} -t nat -A PREROUTING -p tcp -m multiport --dports 80,8000 -j REDIRECT --to-ports 3128"
    programs.run(rule.split())
    (found,) = foreign_rules.probe_other_proxies(case(mode="redirect"))
    assert found.level == "problem"
    programs.run(shlex.split(found.remedy))
    assert not [*foreign_rules.probe_other_proxies(case(mode="redirect"))]
    assert "--to-ports 3128" in programs.run([program, "-t", "nat", "-S"]).stdout


@in_network
@pytest.mark.parametrize("rule, level", [("masquerade", "problem"), ('oifname "wan" masquerade', "warning")])
def test_nat_that_rewrites_the_source(rule: str, level: str) -> None:
    one = case(preserve_source="address")
    assert levels([*foreign_rules.probe_masquerade(one)]) == [("masquerade", "ok")]
    chain = f"chain c {{ type nat hook postrouting priority 100; {rule}; }}"
    programs.run(["nft", "-f", "-"], f"table inet somebodys {{ {chain}; }}")
    (found,) = foreign_rules.probe_masquerade(case(preserve_source="address"))
    assert found.level == level and "--preserve-source no" in found.remedy
    assert not [*foreign_rules.probe_masquerade(case())], "nobody's source is preserved"
