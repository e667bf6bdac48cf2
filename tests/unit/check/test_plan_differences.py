"""In what a ruleset that is there differs from what is asked for, in a network of the test's own."""

from dataclasses import replace
from typing import Any

import pytest
from doctor import PORT, case

from tproxy_relay.check import plan_differences
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.intercept.ruleset import Ruleset
from tproxy_relay.settings import PortRange

pytestmark = pytest.mark.usefixtures("network")

OUT = PortRange(9000, 9000)


def both() -> Plan:
    """As on a host that has IPv6; a new network has none."""
    return replace(case(intercept_outbound=(OUT,)).plan, listen={4: "0.0.0.0", 6: "::"})


def test_nothing_is_there() -> None:
    assert plan_differences.digest_there() is None and plan_differences.found(both()) is None


@pytest.mark.parametrize("where", [Nft(), Iptables("-nft"), Iptables("-legacy")], ids=lambda where: where.name)
def test_the_same_plan_does_not_differ(where: Any) -> None:
    Ruleset(both(), where).install("active")
    assert plan_differences.digest_there() == both().digest
    assert plan_differences.found(both()) == [] and plan_differences.there(both()) == both()


@pytest.mark.parametrize(
    "there, words",
    [
        ({"listen": {4: "0.0.0.0"}}, ["IPv6 has come to this host since, and is not intercepted"]),
        ({"route_priority": 7010}, ["its rules of routing stand at 7010, not at 7006"]),
        ({"route_table": 7010}, ["route-table is 7010 there, not 7006"]),
        ({"mark_mask": 0x70000000}, ["mark-mask is 0x70000000 there, not 0x07000000"]),
        ({"preserve_source": "full"}, ["preserve-source is full there, not no"]),
        ({"outbound": ()}, ["intercept-outbound is nothing there, not 9000"]),
        ({"exempt_uid": None}, []),
        (
            {"mode": "redirect", "on_failure": "closed"},
            ["mode is redirect there, not tproxy", "on-failure is closed there, not open"],
        ),
        (
            {"listen": {4: "0.0.0.0"}, "on_failure": "closed"},
            ["IPv6 has come to this host since, and is not intercepted", "on-failure is closed there, not open"],
        ),
    ],
    ids=str,
)
def test_each_difference_has_its_words(there: dict[str, Any], words: list[str]) -> None:
    Ruleset(replace(both(), **there), Nft()).install("active")
    differences = plan_differences.found(both())
    assert differences is not None and [one.words for one in differences] == words
    assert not any(one.harmless for one in differences)


def test_nat_that_came_and_nat_that_went() -> None:
    beside = replace(both(), beside_nat=True)
    Ruleset(both(), Nft()).install("active")
    (came,) = plan_differences.found(beside) or []
    assert "Docker" in came.words and not came.harmless
    Ruleset(beside, Nft()).install("active")
    (went,) = plan_differences.found(both()) or []
    assert went.harmless


def test_a_plan_that_is_too_far_away_is_not_known() -> None:
    Ruleset(replace(both(), inbound=(PortRange(1, 2), PORT)), Nft()).install("active")
    assert plan_differences.found(both()) is None
