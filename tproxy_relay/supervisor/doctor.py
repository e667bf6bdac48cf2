"""The doctor of a running relay: a process that looks at the host and tries a connection, when it is time to.

What it finds becomes problems of the relay (`health`), and another plan where others want one: then the ruleset is
planned again, while the workers go on. `doctor_hours` says when. The guard's reports say that something has changed,
and how many connections the rules take; that fewer come is a suspicion only, and what is tried decides.
"""

import contextlib
import logging
import selectors
import time
from dataclasses import replace

from tproxy_relay.intercept import plan as plans
from tproxy_relay.logs.repeats import Complaint
from tproxy_relay.net import proc_net
from tproxy_relay.supervisor.doctor_hours import LOOK, TRY, Hours
from tproxy_relay.supervisor.doctor_visit import Visit
from tproxy_relay.supervisor.health import MINOR, Health, Problem
from tproxy_relay.supervisor.missing import Missing
from tproxy_relay.supervisor.replanning import Replanning
from tproxy_relay.supervisor.state import Phase, RelayState

BLIND = 3
"""So many looks in a row that came to nothing are a problem: what was found before may be over, or there is more."""

PROBLEM, WARNING = "problem", "warning"
"""Levels of findings (check/finding.py). Problems are told on; warnings, which are uncertain, are for `check`, and for
who asks why connections are lost."""
_TAKERS = ("lost-marks", "tracking", "filter", "other-proxy")
"""Names of findings of which a warning may explain lost connections."""
MISSING, REPLANNING, BLINDNESS = "missing", "replanning", "doctor"
"""Sources of problems beside LOOK and TRY: the numbers, `replanning`, and looks that come to nothing."""
SELF_PROBE = "self-probe"
"""The name of findings about a connection that was tried."""

log = logging.getLogger(__name__)


class Doctor:
    """At most one process at a time, and none while the relay starts, reloads or stops, or intercepts nothing."""

    def __init__(self, selector: selectors.BaseSelector, state: RelayState, health: Health) -> None:
        """The data of what is registered is the method to call."""
        self._selector = selector
        self._state = state
        self._health = health
        self._hours: Hours | None = None
        self._generation = 0
        self._changes = 0
        self._missing = Missing(proc_net.unfinished)
        self._host_changed = False
        """Since a connection was tried that came."""
        self._replanning = Replanning(state, health)
        self._visit: Visit | None = None
        self._can_try = False
        self._suspect: dict[str, str] | None = None
        """The first finding that may explain lost connections."""
        self._failures = 0
        """In a row."""
        self._complaint = Complaint()

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: not before something happens."""
        if self._visit is not None:
            return self._visit.until
        if self._hours is None or self._state.phase is not Phase.RUNNING:
            return None
        return self._hours.due

    def tick(self, now: float) -> None:
        """Hear what the guard reports, and send the doctor if it is time; `now` is time.monotonic()."""
        if self._visit is not None:
            if now >= self._visit.until or self._state.phase is not Phase.RUNNING:
                self._end_visit(said_all=False)
            return
        if self._state.ending or self._state.interception is None:
            self._leave()
        elif self._state.phase is Phase.RUNNING:
            hours = self._follow_generation(now)
            self._hear(hours, now)
            if now >= hours.due:
                self._send(hours, now)

    def _leave(self) -> None:
        """Nobody looks any more. One that ends says until then what was wrong with it."""
        if self._hours is not None and not self._state.ending:
            for source in (LOOK, TRY, MISSING, REPLANNING, BLINDNESS):
                self._health.put(source, [])
            self._forget_tried()
        self._hours = None

    def _follow_generation(self, now: float) -> Hours:
        generation = self._state.generation
        if self._hours is None or self._generation != generation.number:
            self._hours = Hours(now, generation.settings.self_probe)
            self._generation = generation.number
            if not generation.settings.self_probe:
                self._forget_tried()
        return self._hours

    def _forget_tried(self) -> None:
        self._can_try, self._health.self_probe = False, None
        self._health.put(TRY, [])

    def _hear(self, hours: Hours, now: float) -> None:
        assert self._state.interception is not None
        reports = self._state.interception.reports
        if reports.changes != self._changes:
            self._changes, self._host_changed = reports.changes, True
            hours.changed(now)
        if self._missing.note(reports.counted, self._state.workers.numbers.accepted, now):
            hours.suspected(now)
            self._health.put(MISSING, self._unproven())
        elif not self._missing.certain:
            self._health.put(MISSING, [])

    def _send(self, hours: Hours, now: float) -> None:
        parts = hours.parts(now)
        hours.begun(parts, now)
        generation = self._state.generation
        assert generation.plan is not None
        order = {"settings": generation.settings.to_json(), "plan": plans.to_json(generation.plan), "parts": parts}
        try:
            self._visit = Visit(parts, order, self._in_force)
        except OSError as error:
            self._fail(parts, hours, str(error.strerror), 0.0)
            return
        self._selector.register(self._visit, selectors.EVENT_READ, self._on_readable)
        if self._visit.send():
            self._selector.register(self._visit.order_pipe, selectors.EVENT_WRITE, self._on_writable)

    @property
    def _in_force(self) -> tuple[int, str]:
        generation = self._state.generation
        assert generation.plan is not None
        return generation.number, generation.plan.digest

    def _on_writable(self) -> None:
        if self._visit is not None and not self._visit.send():
            self._selector.unregister(self._visit.order_pipe)

    def _on_readable(self) -> None:
        assert self._visit is not None
        if not self._visit.read():
            self._end_visit(said_all=True)

    def _end_visit(self, *, said_all: bool) -> None:
        visit, self._visit = self._visit, None
        assert visit is not None
        self._selector.unregister(visit)
        with contextlib.suppress(KeyError):  # it has the whole order
            self._selector.unregister(visit.order_pipe)
        visit.close(at_once=not said_all)
        if self._hours is None or self._state.ending:
            return
        if self._state.phase is not Phase.RUNNING or visit.begun_in != self._in_force:
            self._hours.again(time.monotonic())  # it has looked at what is no longer there
        elif said_all and visit.is_whole:
            self._see_again()
            self._take(visit, self._hours)
        else:
            self._fail(visit.parts, self._hours, "its process failed", time.monotonic() - visit.began_at)

    def _fail(self, parts: list[str], hours: Hours, why: str, seconds: float) -> None:
        """Try again soon, and then later and later. What was found before stays."""
        self._failures += 1
        if self._complaint.begins(why):
            log.warning("this host could not be looked at", extra={"why": why, "seconds": round(seconds)})
        if self._failures >= BLIND:
            what = f"this host could not be looked at: {why}; what others do here is not known"
            self._health.put(BLINDNESS, [Problem("blind", what, "tproxy-relay check", MINOR, about="all")])
        hours.done(parts, time.monotonic(), sick=True, new=self._failures == 1)

    def _see_again(self) -> None:
        self._failures = 0
        self._health.put(BLINDNESS, [])
        if self._complaint.ends():
            log.info("this host can be looked at again")

    def _take(self, visit: Visit, hours: Hours) -> None:
        """What a doctor has found that came to its end."""
        before = self._problems
        found = [line["finding"] for line in visit.lines if "finding" in line]
        others = [_problem(one) for one in found if one["level"] == PROBLEM and one["name"] != SELF_PROBE]
        self._health.put(LOOK, others)
        suspects = (one for one in found if one["level"] == WARNING and one["name"] in _TAKERS)
        self._suspect = next(suspects, None)
        plan = next((line for line in visit.lines if "plan" in line), None)
        if plan is None:
            self._replanning.settled()
        replanned = plan is not None and self._replanning.follow(plans.from_json(plan["plan"]), plan["why"])
        if TRY in visit.parts and not replanned and any(one["name"] == SELF_PROBE for one in found):
            self._take_tried([one for one in found if one["name"] == SELF_PROBE], explained=bool(others))
        self._health.put(MISSING, self._unproven())
        now, after = time.monotonic(), self._problems
        sick = bool(after) or (plan is not None and not replanned)
        hours.done(visit.parts, now, sick=sick, new=before != after)
        if replanned:
            hours.again(now)

    def _take_tried(self, found: list[dict[str, str]], *, explained: bool) -> None:
        self._can_try = not any(one["level"] == WARNING or "not tried" in one["what"] for one in found)
        self._health.self_probe = {"time": round(time.time(), 3), "found": [one["what"] for one in found]}
        suspect = None if explained else self._suspect
        self._health.put(TRY, [_because_of(_problem(one), suspect) for one in found if one["level"] == PROBLEM])
        if self._can_try and all(one["level"] != PROBLEM for one in found):
            self._missing.tried(len(found), time.monotonic(), changed=self._host_changed)
            self._host_changed = False

    @property
    def _problems(self) -> set[tuple[str, str]]:
        return {one.problem.identity for one in self._health.of(LOOK, TRY, MISSING, REPLANNING)}

    def _unproven(self) -> list[Problem]:
        """Connections are missing, and none can be tried to see whether they are; or the one that was tried came by an
        interface of its own, and those that are missing have not even come to a listener."""
        if not self._missing.certain or self._health.of(TRY) or proc_net.half_open():
            return []
        if self._missing.traced or (self._can_try and self._missing.traced is None):
            return []
        what = f"{self._missing.number} connections were taken by the rules, and none came to the relay"
        if self._can_try:
            what += ", but for one that was tried: somebody drops or answers (SYNPROXY) what comes by other interfaces"
        return [_because_of(Problem("missing-connections", what, "tproxy-relay check", about="all"), self._suspect)]

    def close(self) -> None:
        """Send nobody any more, and end who is there."""
        self._hours = None
        if self._visit is not None:
            self._end_visit(said_all=False)


def _problem(found: dict[str, str]) -> Problem:
    what = f"{found['what']}: {found['why']}" if found["why"] else found["what"]
    return Problem(found["name"], what, found["remedy"])


def _because_of(one: Problem, suspect: dict[str, str] | None) -> Problem:
    """With who may be to blame, and what mends that, unless it says so already."""
    if suspect is None or suspect["what"] in one.what:
        return one
    return replace(one, what=f"{one.what}; perhaps because {suspect['what']}", remedy=suspect["remedy"] or one.remedy)
