"""Whose ruleset is there, and is it the one that is asked for? In a network of the test's own."""

import shlex
from dataclasses import replace

import pytest
from doctor import case, levels

from tproxy_relay.check import ruleset as probes
from tproxy_relay.check.context import Case
from tproxy_relay.intercept import programs
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.intercept.ruleset import Ruleset

pytestmark = pytest.mark.usefixtures("network")

UNASKED = {"intercept_inbound": ()}


def found(one: Case) -> list[tuple[str, str]]:
    return levels([*probes.probe_ruleset(one)])


def installed(one: Case) -> Ruleset:
    made = Ruleset(one.plan, Nft())
    made.install("active")
    return made


def test_nothing_is_there() -> None:
    assert found(case()) == found(case(**UNASKED)) == [("leftovers", "ok")]


def test_rules_of_a_relay_that_is_not_there_are_removed_as_it_says() -> None:
    installed(case())
    for one in (case(), case(**UNASKED)):
        (leftovers,) = probes.probe_ruleset(one)
        assert (leftovers.name, leftovers.level) == ("leftovers", "problem")
        assert leftovers.remedy == "tproxy-relay rules remove"


def test_refusing_leftovers_are_called_so() -> None:
    installed(case(on_failure="closed"))
    (leftovers,) = probes.probe_ruleset(case(on_failure="closed"))
    assert leftovers.why == "new connections are refused"


def test_a_ruleset_that_somebody_holds() -> None:
    installed(case())
    with Lock():
        assert found(case()) == [("ruleset", "ok")]
        (unasked,) = probes.probe_ruleset(case(**UNASKED))
        assert unasked.level == "warning" and "holds a ruleset that these settings do not ask for" in unasked.what
        programs.run("ip rule del pref 7006".split())
        (damaged,) = probes.probe_ruleset(case())
        assert damaged.level == "problem" and "not what these settings ask for" in damaged.what
        assert damaged.remedy == f"kill -HUP {case().holder}" and "7006" in damaged.what


def test_what_differs_is_named() -> None:
    installed(case())
    with Lock():
        (other,) = probes.probe_ruleset(case(on_failure="closed"))
        assert "on-failure is open there, not closed" in other.what and other.level == "problem"
        (unknown,) = probes.probe_ruleset(case(inbound_port=1))
        assert "made with other settings" in unknown.what


def test_rules_that_do_more_than_is_asked_for_do_no_harm() -> None:
    one = case()
    wider = Ruleset(replace(one.plan, beside_nat=True), Nft())
    wider.install("active")
    with Lock():
        assert found(case()) == [("ruleset", "ok")]
        programs.run("ip rule del pref 7006".split())
        assert found(case()) == [("ruleset", "problem")], "and less"


def test_a_relay_that_listens_without_a_ruleset() -> None:
    one = case()
    one.relay_listens = True
    (missing,) = probes.probe_ruleset(one)
    assert (missing.level, missing.why) == ("problem", "nothing is intercepted")
    assert shlex.split(missing.remedy)[1:3] == ["rules", "apply"]


def test_a_ruleset_that_was_installed_by_hand() -> None:
    installed(case())
    one = case(**UNASKED)
    one.relay_listens = True
    assert found(one) == [("ruleset", "ok")]
