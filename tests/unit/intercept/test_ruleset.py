"""All of it in one go or not at all, and compared with the plan."""

import shlex
from collections.abc import Callable
from dataclasses import replace

import children
import pytest
from plans import PLAN, VARIANTS, quickly

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import backends, programs, routing, ruleset
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.programs import ProgramError
from tproxy_relay.intercept.ruleset import Ruleset

in_network = pytest.mark.usefixtures("network")


def everything() -> list[str]:
    commands = [
        "nft list ruleset",
        *(f"ip -{family} {what}" for family in "46" for what in ("rule", "route show table all")),
    ]
    return [programs.run(command.split()).stdout for command in commands]


def test_routing_comes_first() -> None:
    steps = Ruleset(PLAN, Nft()).steps()
    assert [shlex.join(step.argv) for step in steps] == ["ip -4 -batch -", "ip -6 -batch -", "nft -f -"]
    assert [step.argv[0] for step in Ruleset(VARIANTS["redirect"], Nft()).steps()] == ["nft"]
    assert [step.argv[1] for step in Ruleset(VARIANTS["IPv6"], Nft()).steps()] == ["-6", "-f"]


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_the_script_does_what_apply_does(name: str) -> None:
    rules = Ruleset(PLAN, backends.of_name(name))
    script = ruleset.shell_script(rules.steps(), "A title\nof two lines")
    assert script.startswith("#!/bin/sh\n# A title\n# of two lines\nset -e\n")
    programs.run(["sh"], script)
    assert rules.problems("active") == [] and not rules.apply()
    by_script = everything()
    assert ruleset.remove()
    assert rules.apply() and everything() == by_script


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_apply_and_remove_once_and_twice(name: str) -> None:
    before, rules = everything(), Ruleset(PLAN, backends.of_name(name))
    assert not ruleset.remove()
    assert rules.apply() and not rules.apply()
    assert ruleset.remove() and not ruleset.remove()
    assert everything() == before


@in_network
def test_another_plan_or_backend_takes_its_place() -> None:
    Ruleset(PLAN, Iptables("-nft")).apply()
    other = replace(PLAN, route_table=9, route_priority=100)
    assert Ruleset(other, Nft()).apply()
    assert [one.name for one in backends.present()] == ["nft"]
    assert ruleset.status(other).state == "active"
    assert len(routing.listing()) == 10


class Failing(Nft):
    """Its rules are loaded, and then it says that they were not."""

    def install(self, plan: Plan, state: State) -> None:
        super().install(plan, state)
        raise ProgramError("no more memory")


class Forgetful(Nft):
    """Says that all went well."""

    def install(self, plan: Plan, state: State) -> None:
        programs.run(["nft", "add", "table", "inet", "tproxy_relay"])


@in_network
@pytest.mark.parametrize("former", quickly([None, "inbound", "redirect"], "redirect"))
@pytest.mark.parametrize(
    "where, why", [(Failing, "no more memory"), (Forgetful, "the rules were loaded, but the kernel does not have them")]
)
def test_what_fails_leaves_things_as_they_were(where: Callable[[], Nft], why: str, former: str | None) -> None:
    if former:
        Ruleset(VARIANTS[former], Nft()).apply()
    programs.run(["nft", "add", "table", "inet", "somebodys"])
    before = sorted("".join(everything()).splitlines())
    with pytest.raises(ProgramError, match=why):
        Ruleset(PLAN, where()).apply()
    assert sorted("".join(everything()).splitlines()) == before


@in_network
def test_routing_that_fails_leaves_no_rules() -> None:
    programs.run("ip -6 route add 2001:db8::/64 dev lo table 7006".split())
    before = everything()
    with pytest.raises(RelayError, match="routing table 7006"):
        Ruleset(PLAN, Nft()).apply()
    assert everything() == before


# --- status


@in_network
@pytest.mark.parametrize("state", ["active", "draining"])
def test_status_when_all_is_well(state: State) -> None:
    rules = Ruleset(PLAN, Nft())
    rules.install(state)
    status = ruleset.status(PLAN)
    assert (status.state, status.backend, status.problems) == (state, "nft", [])
    assert len(status.routing) == 10
    assert {count.chain for count in status.counts} == {"from_lo", "prerouting", "output"}
    assert any(count.packets == 0 for count in status.counts) and any(count.packets is None for count in status.counts)


@in_network
def test_status_of_refusing_rules() -> None:
    Iptables("-nft").install(PLAN, "closed")
    assert (ruleset.status(PLAN).state, ruleset.status(PLAN).problems) == ("closed", [])


@in_network
def test_status_when_something_is_wrong() -> None:
    assert ruleset.status(PLAN) == ("absent", None, [], [], [])
    routing.install(PLAN, {})
    assert ruleset.status(PLAN).problems == ["there are rules of routing, but none for packets"]
    Nft().install(PLAN, "active")
    assert ruleset.status(PLAN).state == "active"
    another = ruleset.status(replace(PLAN, inbound=PLAN.inbound[:1]))
    assert another.state == "degraded" and "stands where 'plan " in another.problems[0]
    programs.run("ip -6 rule del pref 7007".split())
    gone = ruleset.status(PLAN)
    assert gone.state == "degraded"
    assert gone.problems == [f"ip -6: 'rule {routing.rules(PLAN)[2]}' is missing"]
    Iptables("-nft").install(PLAN, "active")
    assert ruleset.status(PLAN).problems[0] == "there are rules of iptables-nft too"
    programs.run(["nft", "flush", "ruleset"])
    assert ruleset.status(PLAN).state == "degraded"


def test_without_the_right_it_is_said(require_or_skip: Callable[[str], object]) -> None:
    code = "from tproxy_relay.intercept import ruleset\nruleset.remove()"
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)  # type: ignore[arg-type]
    assert "CapabilityMissingError: the ruleset needs CAP_NET_ADMIN" in children.run_python(code, prefix=prefix).stderr
