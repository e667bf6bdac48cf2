"""All of it in one go or not at all, and compared with the plan."""

import re
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
from tproxy_relay.settings import PortRange

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


# --- another plan in its place

FULL = VARIANTS["full"]
REDIRECT = VARIANTS["redirect"]


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_any_plan_can_be_replaced_by_one_that_knows_its_connections(name: str) -> None:
    before, former = everything(), VARIANTS["outbound"]
    rules = Ruleset(former, backends.of_name(name))
    rules.install("active")
    for plan in (PLAN, VARIANTS["many ports"], VARIANTS["beside nat"], VARIANTS["loopback"], VARIANTS["closed"]):
        rules.replace(plan, "active", "active")
        assert rules.plan == plan and rules.problems("active") == []
        assert (ruleset.status(plan).state, ruleset.status(plan).problems) == ("active", [])
    rules.replace(PLAN, "active", "draining")
    assert ruleset.status(PLAN).state == "draining"
    rules.backend.remove()
    assert ruleset.remove() and everything() == before


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_what_only_the_former_plan_had_is_gone(name: str) -> None:
    """At once from our chains and from routing; what iptables-nft has made for them, with the rest."""
    before, plan = everything(), replace(REDIRECT, on_failure="closed")
    rules = Ruleset(plan, backends.of_name(name))
    rules.install("active")
    wanted = chains(), routing.listing()
    rules.replace(replace(plan, preserve_source="full"), "active", "active")
    rules.plan = plan  # as if there were no connections to lose
    rules.replace(replace(plan, outbound=()), "active", "active")
    assert "outbound" not in str(rules.backend.labels()) and chains() != wanted[0]
    rules.replace(plan, "active", "active")
    assert (chains(), routing.listing()) == wanted and rules.problems("active") == []
    assert ruleset.remove() and everything() == before


def chains() -> list[str]:
    """Ours, empty ones too."""
    listed = "".join(
        programs.run(command, check=False).stdout for command in (["nft", "list", "ruleset"], ["iptables-nft-save"])
    )
    ours = re.findall(
        r"chain (nat_\w+|output|prerouting|from_lo|zone_\w+) {|^:(TPROXY_RELAY_\w+)", listed, re.MULTILINE
    )
    return sorted(first or second for first, second in ours)


class RefusesClosed(Nft):
    """Loads any plan but one, of which half is there when it fails; or nothing, `first`."""

    first = False

    def replace(self, plan: Plan, state: State, *, hold: bool) -> None:
        if plan.on_failure == "open":
            super().replace(plan, state, hold=hold)
            return
        if not self.first:
            super().replace(replace(plan, inbound=plan.inbound[:1]), state, hold=False)
        raise ProgramError("no more memory")


class RefusesAtOnce(RefusesClosed):
    """Nothing is changed then."""

    first = True


class Lying(Nft):
    """Says that all went well, with a plan that was refused."""

    def replace(self, plan: Plan, state: State, *, hold: bool) -> None:
        if plan.on_failure == "open":
            super().replace(plan, state, hold=hold)


class Late(Iptables):
    """Fails when all is there."""

    def replace(self, plan: Plan, state: State, *, hold: bool) -> None:
        super().replace(plan, state, hold=hold)
        if plan.families == (4, 6):
            raise ProgramError("no more memory")


@in_network
def test_a_family_that_came_goes_when_the_rest_fails() -> None:
    rules = Ruleset(VARIANTS["IPv4"], Late("-nft"))
    rules.install("active")
    before = rules.backend.labels(), routing.listing()
    with pytest.raises(ProgramError, match="no more memory"):
        rules.replace(PLAN, "active", "active")
    assert (rules.backend.labels(), routing.listing()) == before
    assert rules.problems("active") == []


@in_network
@pytest.mark.parametrize(
    "where, why",
    [
        (RefusesClosed, "no more memory"),
        (RefusesAtOnce, "no more memory"),
        (Lying, "the rules were loaded, but the kernel does not have them"),
    ],
)
def test_what_fails_to_replace_leaves_the_former_plan(where: type[Nft], why: str) -> None:
    rules = Ruleset(REDIRECT, where(hold=True))
    rules.install("active")
    before = everything()
    with pytest.raises(ProgramError, match=why):
        rules.replace(replace(REDIRECT, preserve_source="full", on_failure="closed"), "active", "active")
    assert rules.plan == REDIRECT and rules.problems("active") == []
    assert everything() == before
    rules.backend.remove()


KNOWING = [
    (PLAN, replace(PLAN, inbound=(), outbound=PLAN.outbound[:1])),
    (PLAN, replace(PLAN, inbound_port=1, outbound_port=2, listen={4: "127.0.0.1", 6: "::1"}, beside_nat=True)),
    (VARIANTS["IPv4"], PLAN),
    (PLAN, replace(PLAN, on_failure="closed", exempt_uid=7)),
    (replace(VARIANTS["inbound"], exempt_uid=7), VARIANTS["inbound"]),
    (VARIANTS["inbound"], replace(VARIANTS["inbound"], preserve_source="full")),
    (VARIANTS["address"], FULL),
    (REDIRECT, VARIANTS["redirect full"]),
    (FULL, replace(FULL, inbound=VARIANTS["many ports"].inbound + FULL.inbound, outbound=FULL.outbound[:1])),
    (FULL, replace(FULL, inbound=(PortRange(400, 9000),))),
    (REDIRECT, replace(REDIRECT, inbound=())),
    (REDIRECT, replace(REDIRECT, outbound=())),
]

LOSING = [
    (PLAN, VARIANTS["IPv6"], "no longer intercepting IPv4"),
    (PLAN, VARIANTS["inbound"], "anything outbound"),
    (VARIANTS["redirect outbound"], replace(REDIRECT, inbound=(), outbound=()), "anything outbound"),
    (replace(REDIRECT, outbound=()), replace(REDIRECT, inbound=(), outbound=()), "anything inbound"),
    (VARIANTS["address"], replace(VARIANTS["address"], inbound=()), "anything inbound"),
    (VARIANTS["address"], PLAN, "no longer preserving source addresses"),
    (PLAN, VARIANTS["address"], "preserving source addresses from now on"),
    (replace(PLAN, exempt_uid=7), replace(PLAN, exempt_uid=8), "another account"),
    (replace(PLAN, exempt_uid=7), PLAN, "another account"),
    (FULL, replace(FULL, preserve_source="address"), "source ports"),
    (FULL, replace(FULL, inbound=(PortRange(443, 443), PortRange(8000, 8099))), "some ports"),
]


@pytest.mark.parametrize("former, plan", KNOWING)
def test_a_plan_that_knows_all_connections(former: Plan, plan: Plan) -> None:
    ruleset.refuse_losses(former, plan)


@in_network
@pytest.mark.parametrize("former, plan, what", LOSING)
def test_a_plan_that_would_end_connections_is_refused(former: Plan, plan: Plan, what: str) -> None:
    rules = Ruleset(former, Nft())
    rules.install("active")
    before = everything()
    with pytest.raises(RelayError, match=f"{what}.* would end connections that the relay has: stop it and start it"):
        rules.replace(plan, "active", "active")
    assert everything() == before and rules.plan == former


# --- status


@in_network
@pytest.mark.parametrize("state", ["active", "draining"])
def test_status_when_all_is_well(state: State) -> None:
    rules = Ruleset(PLAN, Nft())
    rules.install(state)
    status = ruleset.status(PLAN)
    assert (status.state, status.backend, status.problems) == (state, "nft", [])
    assert len(status.routing) == 10
    chains = {"from_lo", "errors", "answered", "prerouting", "own_errors", "output"}
    assert {count.chain for count in status.counts} == chains
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
