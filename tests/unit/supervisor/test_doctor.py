"""The doctor's manager, with processes that say what the test wants them to."""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hands import Hands
from plans import PLAN

from tproxy_relay.guard.guard_client import Health as RulesetHealth
from tproxy_relay.guard.messages import Counted, HostChanged
from tproxy_relay.guard.reports import Reports
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.supervisor import doctor, doctor_hours, doctor_visit
from tproxy_relay.supervisor.doctor import Doctor
from tproxy_relay.supervisor.health import Health
from tproxy_relay.supervisor.missing import Missing
from tproxy_relay.supervisor.state import Phase, RelayState

FOUND = {"name": "marks", "level": "problem", "what": "nft rule x sets marks", "why": "lost", "remedy": "nft delete x"}
TRIED = {"name": "self-probe", "level": "ok", "what": "an inbound connection is relayed", "why": "", "remedy": ""}
LOST = {**TRIED, "level": "problem", "what": "an inbound connection is lost"}
DONE = {"done": True}


class Ruleset:
    """In the place of an Interception."""

    def __init__(self) -> None:
        self.reports = Reports(Counted())
        self.plan = PLAN
        self.health = RulesetHealth("active", "nft", PLAN.digest, None)

    def replace(self, plan: Plan, timeout: float) -> None:
        """As Interception's."""
        self.plan = plan


class Practice:
    """A relay, its doctor, and what that says next."""

    def __init__(self, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hands = hands
        self.state = RelayState({})
        settings = replace(hands.generation.settings, self_probe=600.0)
        self.state.workers, self.state.phase = hands.workers, Phase.RUNNING
        self.state.current = replace(hands.generation, plan=PLAN, settings=settings)
        self.ruleset = Ruleset()
        self.state.interception = self.ruleset  # type: ignore[assignment]
        self.health = Health()
        self.doctor = Doctor(hands.selector, self.state, self.health)
        self.script = ""
        monkeypatch.setattr(doctor_visit.children, "module_command", lambda _: [sys.executable, "-c", self.script])

    def says(self, *lines: dict[str, Any]) -> None:
        """From now on; it echoes the parts that it was asked for in a line of its own."""
        text = "\n".join(map(json.dumps, lines))
        self.script = f"import sys; sys.stdin.readline(); print({text!r})"

    def visited(self, now: float) -> None:
        """Until the one that is due at that time has come and gone."""
        self.doctor.tick(now)
        assert self.doctor.deadline is not None and self.doctor._visit is not None, "nobody was sent"
        self.hands.turn_until(lambda: self.doctor._visit is None, "it has ended")

    @property
    def problems(self) -> list[str]:
        """What is wrong."""
        return [one.problem.what for one in self.health.problems]


@pytest.fixture
def practice(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> Iterator[Practice]:
    monkeypatch.setattr(doctor_hours, "SETTLED", 0.0)
    monkeypatch.setattr(doctor_hours, "FIRST_TRY", 0.0)
    made = Practice(hands, monkeypatch)
    yield made
    made.doctor.close()


def test_what_is_found_is_a_problem_until_it_is_not_found(practice: Practice) -> None:
    practice.says({"finding": FOUND}, {"finding": {**FOUND, "level": "warning"}}, {"finding": TRIED}, DONE)
    practice.visited(time.monotonic())
    assert practice.problems == ["nft rule x sets marks: lost"]
    assert practice.health.self_probe is not None
    assert practice.health.self_probe["found"] == ["an inbound connection is relayed"]
    practice.says({"finding": LOST}, DONE)
    practice.visited(time.monotonic() + 60)
    assert practice.problems == ["an inbound connection is lost"]
    practice.says({"finding": TRIED}, DONE)
    practice.visited(time.monotonic() + 120)
    assert practice.problems == []


def test_another_plan_is_put_in_force(practice: Practice) -> None:
    later = replace(PLAN, route_priority=5267)
    practice.says({"plan": plans.to_json(later), "why": "a VPN"}, DONE)
    practice.visited(time.monotonic())
    assert practice.ruleset.plan == later == practice.state.generation.plan


def test_a_change_sends_it(practice: Practice) -> None:
    practice.says(DONE)
    practice.visited(time.monotonic())
    later = time.monotonic() + 100
    practice.doctor.tick(later)
    assert practice.doctor._visit is None, "nothing has happened"
    practice.ruleset.reports.take(HostChanged())
    practice.visited(later)


def test_connections_that_do_not_come_send_it(practice: Practice) -> None:
    practice.says({"finding": {**TRIED, "level": "warning", "what": "no connection was tried (no namespace)"}}, DONE)
    practice.visited(time.monotonic())
    later = time.monotonic() + 100
    practice.ruleset.reports.take(Counted(8, 4))
    practice.visited(later)
    assert practice.problems == [], "they may be on their way"
    practice.ruleset.reports.take(Counted(9, 4))
    practice.visited(later + 13)
    assert practice.problems == ["13 connections were taken by the rules, and none came to the relay"]
    practice.ruleset.reports.take(Counted(13, 4))
    practice.visited(later + 30)
    assert practice.problems == ["17 connections were taken by the rules, and none came to the relay"]
    assert len(practice.hands.logged("degraded")) == 1, "one line for one state"
    practice.ruleset.reports.take(Counted(0, 0))
    practice.visited(later + 60)
    assert practice.problems == []


@pytest.mark.parametrize("traces", [0, 100])
def test_one_that_was_tried_shows_nothing_of_those_that_come_to_nobody(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, traces: int
) -> None:
    counted = [0]
    monkeypatch.setattr(practice.doctor, "_missing", Missing(lambda: counted[-1]))
    practice.says({"finding": TRIED}, DONE)
    practice.visited(time.monotonic())
    later = time.monotonic() + 100
    practice.says(DONE)
    practice.ruleset.reports.take(Counted(8, 4))
    practice.visited(later)
    counted.append(traces)
    practice.ruleset.reports.take(Counted(9, 4))
    practice.doctor.tick(later + 13)
    assert bool(practice.problems) == (not traces), "scanners leave traces"
    assert not practice.problems or "one that was tried" in practice.problems[0]


@pytest.mark.parametrize("script", ["", "import os; os._exit(3)", "print('nonsense')"])
def test_one_that_does_not_come_to_its_end_changes_nothing(practice: Practice, script: str) -> None:
    practice.says({"finding": FOUND}, DONE)
    practice.visited(time.monotonic())
    practice.script = script
    practice.visited(time.monotonic() + 60)
    assert len(practice.problems) == 1
    assert practice.hands.logged("this host could not be looked at")


def test_one_that_hangs_is_killed(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    practice.script = "import time; time.sleep(1000)"
    now = time.monotonic()
    practice.doctor.tick(now)
    practice.doctor.tick(now + 1)
    assert practice.doctor._visit is not None and practice.doctor.deadline == practice.doctor._visit.until
    practice.doctor.tick(now + doctor_visit.TIMEOUT + 1)
    assert practice.doctor._visit is None


def test_none_is_sent_by_a_relay_that_ends_or_takes_nothing(practice: Practice) -> None:
    practice.says(DONE)
    practice.state.interception = None
    practice.doctor.tick(time.monotonic())
    assert practice.doctor.deadline is None
    practice.state.interception = practice.ruleset  # type: ignore[assignment]
    practice.state.phase = Phase.DRAINING
    practice.doctor.tick(time.monotonic())
    assert practice.doctor.deadline is None


LATER = replace(PLAN, route_priority=5267)
DROPPER = {**FOUND, "name": "filter", "level": "warning", "what": "chain x drops some", "remedy": "nft delete y"}


def reload(practice: Practice, **settings: Any) -> None:
    """As far as the doctor sees it: the next generation, with another plan."""
    before = practice.state.generation
    plan, of_next = replace(PLAN, route_table=77), replace(before.settings, **settings)
    practice.state.current = replace(before, number=before.number + 1, plan=plan, settings=of_next)


def test_what_was_looked_at_before_a_reload_is_not_for_the_plan_after_it(practice: Practice) -> None:
    practice.says({"plan": plans.to_json(LATER), "why": "a VPN"}, {"finding": FOUND}, DONE)
    practice.doctor.tick(time.monotonic())
    reload(practice)
    practice.hands.turn_until(lambda: practice.doctor._visit is None, "it has ended")
    assert practice.ruleset.plan == PLAN and practice.state.generation.plan != LATER and practice.problems == []
    practice.visited(time.monotonic() + 4)
    assert practice.ruleset.plan == LATER == practice.state.generation.plan, "it is looked again at once"


def test_one_that_is_there_when_a_reload_begins_is_ended(practice: Practice) -> None:
    practice.script = "import time; time.sleep(1000)"
    now = time.monotonic()
    practice.doctor.tick(now)
    practice.state.phase = Phase.ROLLING_OUT
    practice.doctor.tick(now + 0.1)
    assert practice.doctor._visit is None and practice.doctor.deadline is None
    practice.doctor.tick(now + 100)
    assert practice.doctor._visit is None and not practice.hands.logged("this host could not be looked at")
    practice.state.phase = Phase.RUNNING  # it was refused
    practice.says({"finding": FOUND}, DONE)
    practice.visited(now + 100)
    assert len(practice.problems) == 1


@pytest.mark.parametrize("how", ["crashed", "not followed"])
def test_what_did_not_work_is_tried_again_soon(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    practice.says(*([] if how == "crashed" else [{"plan": plans.to_json(LATER), "why": "a VPN"}, DONE]))
    if how != "crashed":
        monkeypatch.setattr(practice.ruleset, "health", RulesetHealth("draining", "nft", PLAN.digest, None))
    practice.visited(time.monotonic())
    assert practice.doctor.deadline is not None and practice.doctor.deadline < time.monotonic() + 10


def test_who_cannot_look_says_so_until_it_can(practice: Practice) -> None:
    for number in range(1, doctor.BLIND + 3):
        practice.script = "import os; os._exit(3)"
        practice.visited(time.monotonic() + 100 * number)
        assert len(practice.problems) == (number >= doctor.BLIND)
    assert "could not be looked at" in practice.problems[0]
    assert len(practice.hands.logged("this host could not be looked at")) == 1, "once"
    practice.says(DONE)
    practice.visited(time.monotonic() + 10000)
    assert practice.problems == [] and practice.hands.logged("this host can be looked at again")


def test_who_tries_nothing_any_more_knows_nothing_of_it(practice: Practice) -> None:
    practice.says({"finding": LOST}, DONE)
    practice.visited(time.monotonic())
    assert len(practice.problems) == 1
    reload(practice, self_probe=0.0)
    practice.doctor.tick(time.monotonic())
    assert practice.problems == [] and practice.health.self_probe is None and not practice.doctor._can_try


def test_a_relay_that_takes_nothing_any_more_has_no_trouble_with_it(practice: Practice) -> None:
    practice.says({"finding": FOUND}, {"finding": LOST}, DONE)
    practice.visited(time.monotonic())
    assert len(practice.problems) == 2
    practice.state.interception = None
    practice.doctor.tick(time.monotonic())
    assert practice.problems == []


def test_what_is_uncertain_explains_lost_connections(practice: Practice) -> None:
    practice.says({"finding": DROPPER}, {"finding": LOST}, DONE)
    practice.visited(time.monotonic())
    (one,) = practice.health.serious
    assert one.what == "an inbound connection is lost; perhaps because chain x drops some"
    assert one.remedy == "nft delete y"


def test_an_order_of_any_size_keeps_nobody_waiting(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    long = ["x" * 1000] * 1000
    monkeypatch.setattr(practice.doctor._state.generation.settings.__class__, "to_json", lambda _: {"long": long})
    practice.script = "import time; time.sleep(1000)"
    now = time.monotonic()
    practice.doctor.tick(now)
    assert practice.doctor._visit is not None and time.monotonic() < now + 10, "it does not read"
    practice.doctor.tick(now + doctor_visit.TIMEOUT + 1)
    text = json.dumps({"finding": FOUND}) + "\n" + json.dumps(DONE)
    practice.script = f"import json, sys; json.loads(sys.stdin.readline())['settings']['long'][999]; print({text!r})"
    practice.visited(now + 200)
    assert len(practice.problems) == 1, "it had the whole order"
