"""What other people's rules do to a packet, whatever program made them."""

from collections.abc import Iterator

import pytest
from foreign_firewalls import IN, MARK, MASK, cleared, nft

from tproxy_relay.check import firewall
from tproxy_relay.check.firewall import ACCEPT, DROP, MAYBE, Chain, Condition, Rule
from tproxy_relay.lab import Lab


@pytest.fixture
def host(lab: Lab) -> Iterator[Lab]:
    with cleared(lab):
        yield lab


@pytest.mark.parametrize(
    "rule, certain", [("masquerade", True), ('oifname "wan" masquerade', False), ("tcp dport 80 masquerade", None)]
)
def test_masquerading(host: Lab, rule: str, certain: bool | None) -> None:
    rules = nft(host, "meta mark & 0x07000000 == 0x02000000 accept", rule, hook="nat hook postrouting priority 100")
    found = [sure for _, sure in firewall.rewrites_source(rules, IN)]
    assert found == ([] if certain is None else [certain])
    assert list(firewall.rewrites_source(rules, IN._replace(mark=0x02000000))) == []


# --- rules made here


@pytest.mark.parametrize(
    "condition, holds",
    [
        (Condition("ports", ((1, 7999), (8000, 8000))), True),
        (Condition("ports", ((1, 7999),)), False),
        (Condition("ports", ((1, 7999),), True), True),
        (Condition("proto", ("udp",)), False),
        (Condition("family", ("6",)), False),
        (Condition("mark", ((MARK, MASK),)), True),
        (Condition("mark", ((0, MASK),)), False),
        (Condition("mark", ((MARK | 1, MASK | 1),)), None),
        (Condition("iif", ("lo",)), False),
        (Condition("iif", ("eth0",)), None),
        (Condition("iif", ("eth0",), True), None),
        (Condition("iif", ("eth*", "lo")), None),
        (Condition("unknown"), None),
        (Condition("unknown", (), True), None),
    ],
)
def test_a_condition_holds_or_not_or_nobody_knows(condition: Condition, holds: bool | None) -> None:
    assert condition.holds(IN) is holds


def rule(action: str, *conditions: Condition, target: str = "") -> Rule:
    return Rule(conditions, action, target, (), f"a rule to {action}")


def chain(name: str, *rules: Rule, drops: bool = False) -> Chain:
    return Chain(name, f"chain {name}", "input", "filter", (4, 6), drops, rules)


PERHAPS, NEVER = Condition("unknown"), Condition("ports", ((1, 1),))


@pytest.mark.parametrize(
    "rules, drops, expected",
    [
        ([], True, (DROP, "policy drop of chain c")),
        ([], False, (ACCEPT, "")),
        ([rule("drop", NEVER), rule("accept")], True, (ACCEPT, "")),
        ([rule("drop")], False, (DROP, "a rule to drop")),
        ([rule("accept", PERHAPS)], True, (MAYBE, "")),
        ([rule("jump", target="c")], True, (MAYBE, "")),
    ],
)
def test_a_verdict_says_what_drops_it(rules: list[Rule], drops: bool, expected: tuple[str, str]) -> None:
    one = chain("c", *rules, drops=drops)
    assert firewall.verdict(one, {"c": one}, IN) == expected


@pytest.mark.parametrize("value", ["eth*", "eth+", "eth1"])
def test_an_interface_is_known_by_how_it_begins(value: str) -> None:
    condition = Condition("iif", (value,))
    assert condition.holds(IN._replace(iif="eth1")) and condition.holds(IN._replace(iif="tprchk0")) is False


def test_what_a_packet_meets_is_found_behind_jumps() -> None:
    taking = rule("tproxy", Condition("ports", ((8000, 8000),)))
    inner = Chain("d", "", "", "", (4,), False, (taking,))
    other = Chain("e", "", "", "", (4,), False, (rule("tproxy"),))
    for conditions, certain in (((), True), ((PERHAPS,), False)):
        base = chain("c", rule("jump", *conditions, target="d"))
        table = {"c": base, "d": inner, "e": other}
        assert list(firewall.met(base, table, IN))[1:] == [(taking, certain)], "nothing leads to the other one"
        assert len(list(firewall.met(base, table, IN._replace(port=22)))) == 1
        assert [one.name for one, _ in firewall.all_rules({"t": table})] == ["c", "d", "e"]
