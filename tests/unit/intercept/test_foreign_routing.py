"""Rules of routing of others, and where ours go then."""

from dataclasses import replace

import pytest
from plans import PLAN

from tproxy_relay.intercept import foreign_routing, programs, routing

pytestmark = pytest.mark.usefixtures("network")


def add(*rules: str) -> None:
    programs.run("ip route add default dev lo table 52".split())
    programs.run("ip -6 route add default dev lo table 52".split())
    for rule in rules:
        programs.run(["ip", *rule.split()])


@pytest.mark.parametrize(
    "rules, expected",
    [
        ((), 7006),
        (("rule add pref 5270 lookup 52",), 5267),
        (("-6 rule add pref 5270 lookup 52",), 5267),
        (("rule add pref 5270 not fwmark 0x80000/0xff0000 lookup 52",), 5267),
        (("rule add pref 5270 fwmark 0x80000/0xff0000 lookup 52",), 5267),
        (("rule add pref 5270 not fwmark 0x7000000/0x7ff0000 lookup 52",), 5267),
        (("rule add pref 5270 not fwmark 0/0x4000000 lookup 52",), 7006),
        (("rule add pref 5270 fwmark 0x1080000/0x7ff0000 lookup 52",), 5267),
        (("rule add pref 5270 fwmark 0x4080000/0x7ff0000 lookup 52",), 7006),
        (("rule add pref 5270 fwmark 0x80000 lookup 52",), 7006),
        (("rule add pref 7006 from 192.0.2.1 lookup 52",), 7003),
        (("rule add pref 7009 lookup 52",), 7006),
        (("rule add pref 5270 lookup 53",), 7006),
        (("rule add pref 5250 unreachable",), 5247),
        (("rule add pref 5270 lookup 52 suppress_prefixlength 0",), 7006),
        (("rule add pref 5270 lookup 52", "rule add pref 5268 fwmark 1 lookup 52"), 5265),
        (("rule add pref 3 lookup 52",), 7006),
    ],
)
def test_ours_go_before_a_rule_that_would_take_our_packets(rules: tuple[str, ...], expected: int) -> None:
    add(*rules)
    assert foreign_routing.priority(PLAN) == expected


def test_others_have_bits_of_the_mark_that_nobody_knows() -> None:
    """Whoever has them gives them to our packets, too: mwan3 does. The place is the same as long as theirs is there."""
    add("rule add pref 2001 fwmark 0x100/0x3f00 lookup 52")
    assert foreign_routing.priority(PLAN) == 1998
    routing.install(replace(PLAN, route_priority=1998), {})
    assert foreign_routing.priority(PLAN) == 1998


def test_our_own_rules_are_not_in_the_way() -> None:
    routing.install(PLAN, {})
    assert foreign_routing.priority(PLAN) == 7006
    assert foreign_routing.priority(replace(PLAN, route_priority=8000)) == 8000


def test_a_plan_without_routing_has_nothing_to_move() -> None:
    add("rule add pref 5270 lookup 52")
    assert foreign_routing.priority(replace(PLAN, mode="redirect")) == 7006
