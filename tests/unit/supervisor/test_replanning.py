"""Another plan for a relay that runs, as far as it may be."""

from collections.abc import Iterator
from dataclasses import replace

import lines as lines_module
import pytest
from hands import Hands
from lines import Lines, fields
from plans import PLAN

from tproxy_relay.errors import RelayError
from tproxy_relay.guard.guard_client import Health as RulesetHealth
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.supervisor import replanning
from tproxy_relay.supervisor.health import Health
from tproxy_relay.supervisor.replanning import Replanning
from tproxy_relay.supervisor.state import Phase, RelayState

WATCHDOG_SECONDS = 30
"""etc/systemd/tproxy-relay.service."""

LATER = replace(PLAN, route_priority=5267)


class Ruleset:
    """In the place of an Interception: the kernel's part is shown in tests/e2e/test_degraded.py."""

    def __init__(self) -> None:
        self.plans = [PLAN]
        self.refuses = False
        self.health = RulesetHealth("active", "nft", PLAN.digest, None)

    def replace(self, plan: Plan, timeout: float) -> None:
        """As Interception's."""
        assert timeout == replanning.ANSWER_TIMEOUT < WATCHDOG_SECONDS / 2
        if self.refuses:
            raise RelayError("no")
        self.plans.append(plan)


@pytest.fixture
def said() -> Iterator[Lines]:
    with lines_module.collected() as lines:
        yield lines


@pytest.fixture
def state(hands: Hands) -> RelayState:
    made = RelayState({})
    made.workers, made.current, made.phase = hands.workers, replace(hands.generation, plan=PLAN), Phase.RUNNING
    made.interception = Ruleset()  # type: ignore[assignment]
    return made


def test_the_plan_in_force_is_another_one(state: RelayState, said: Lines) -> None:
    health = Health()
    assert Replanning(state, health).follow(LATER, "a VPN")
    assert state.generation.plan == LATER == state.interception.plans[-1]  # type: ignore[union-attr]
    assert fields(said.of("ruleset planned again")[0])["why"] == "a VPN" and health.problems == []


def test_what_keeps_it_is_a_problem(state: RelayState) -> None:
    health = Health()
    one = Replanning(state, health)
    state.interception.refuses = True  # type: ignore[union-attr]
    assert not one.follow(LATER, "a VPN") and state.generation.plan == PLAN
    assert [found.problem.what for found in health.problems] == ["the ruleset cannot be planned again: no"]
    one.settled()
    assert health.problems == []


def test_not_while_something_else_changes_it(state: RelayState) -> None:
    state.phase = Phase.ROLLING_OUT
    assert not Replanning(state, Health()).follow(LATER, "a VPN")


def test_who_changes_the_host_without_end_is_not_followed(state: RelayState) -> None:
    health = Health()
    one = Replanning(state, health)
    assert [one.follow(plan, "two VPNs") for plan in [LATER, PLAN] * 4] == [True] * replanning.MOST + [False] * 3
    (found,) = health.problems
    assert found.problem.name == "host-changes" and "two VPNs" in found.problem.what
    assert found.problem.remedy.startswith("kill -HUP ")


def test_what_was_not_done_does_not_count(state: RelayState) -> None:
    health = Health()
    one = Replanning(state, health)
    state.interception.refuses = True  # type: ignore[union-attr]
    assert not any(one.follow(LATER, "a VPN") for _ in range(2 * replanning.MOST))
    assert [found.problem.name for found in health.problems] == ["replanning"], "nobody changes this host all the time"
    state.interception.refuses = False  # type: ignore[union-attr]
    assert one.follow(LATER, "a VPN") and health.problems == []
