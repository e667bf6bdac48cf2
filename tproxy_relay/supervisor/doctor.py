"""The doctor of a running relay: a process that looks at the host and tries a connection, when it is time to.

What it finds becomes problems of the relay (`health`), and another plan where others want one: then the ruleset is
planned again, while the workers go on. `doctor_hours` says when. The guard's reports say that something has changed,
and how many connections the rules take; that fewer come is a suspicion only, and what is tried decides.
"""

import contextlib
import json
import logging
import os
import selectors
import subprocess
import time
from typing import Any

from tproxy_relay.guard.messages import Counted
from tproxy_relay.intercept import plan as plans
from tproxy_relay.net import proc_net
from tproxy_relay.supervisor.doctor_hours import LOOK, TRY, Hours
from tproxy_relay.supervisor.health import Health, Problem
from tproxy_relay.supervisor.missing import Missing
from tproxy_relay.supervisor.replanning import Replanning
from tproxy_relay.supervisor.state import Phase, RelayState
from tproxy_relay.system import children

TIMEOUT = 30.0
"""Seconds for one look; it takes half of one, and some more for each connection that does not get through."""
END_TIMEOUT = 1.0
"""Seconds for a process that has said all to end."""

PROBLEM = "problem"
"""The level of findings (check/finding.py) that are told on; warnings are for `check`."""
MISSING = "missing"
"""A source of problems beside LOOK and TRY: the numbers."""
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
        self._visit: _Visit | None = None
        self._can_try = False

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: not before something happens."""
        if self._visit is not None:
            return self._visit.until
        return None if self._hours is None else self._hours.due

    def tick(self, now: float) -> None:
        """Hear what the guard reports, and send the doctor if it is time; `now` is time.monotonic()."""
        if self._visit is not None:
            if now >= self._visit.until or self._state.ending:
                self._end_visit(said_all=False)
            return
        if self._state.phase is not Phase.RUNNING or self._state.interception is None:
            self._hours = None
            return
        self._follow_generation(now)
        assert self._hours is not None
        self._hear(self._hours, now)
        if now >= self._hours.due:
            self._send(self._hours, now)

    def _follow_generation(self, now: float) -> None:
        generation = self._state.generation
        if self._hours is None or self._generation != generation.number:
            self._hours = Hours(now, generation.settings.self_probe)
            self._generation = generation.number

    def _hear(self, hours: Hours, now: float) -> None:
        assert self._state.interception is not None
        reports = self._state.interception.reports
        if reports.changes != self._changes:
            self._changes, self._host_changed = reports.changes, True
            hours.changed(now)
        if self._missing.note(reports.counted or Counted(), self._state.workers.numbers.accepted, now):
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
            self._visit = _Visit(parts, order)
        except OSError as error:
            log.error("cannot look at this host: %s", error.strerror)
            hours.done(parts, now, sick=False, new=False)
            return
        self._selector.register(self._visit, selectors.EVENT_READ, self._on_readable)

    def _on_readable(self) -> None:
        assert self._visit is not None
        if not self._visit.read():
            self._end_visit(said_all=True)

    def _end_visit(self, *, said_all: bool) -> None:
        visit, self._visit = self._visit, None
        assert visit is not None
        self._selector.unregister(visit)
        visit.close(at_once=not said_all)
        if self._hours is None or self._state.ending:
            return
        if not (said_all and visit.lines and "done" in visit.lines[-1]):
            log.warning("this host could not be looked at", extra={"seconds": round(time.monotonic() - visit.began_at)})
            self._hours.done(visit.parts, time.monotonic(), sick=False, new=False)
            return
        self._take(visit, self._hours)

    def _take(self, visit: "_Visit", hours: Hours) -> None:
        """What a doctor has found that came to its end."""
        before = self._problems
        found = [line["finding"] for line in visit.lines if "finding" in line]
        others = [_problem(one) for one in found if one["level"] == PROBLEM and one["name"] != SELF_PROBE]
        self._health.put(LOOK, others)
        plan = next((line for line in visit.lines if "plan" in line), None)
        if plan is None:
            self._replanning.settled()
        replanned = plan is not None and self._replanning.follow(plans.from_json(plan["plan"]), plan["why"])
        if TRY in visit.parts and not replanned and any(one["name"] == SELF_PROBE for one in found):
            self._take_tried([one for one in found if one["name"] == SELF_PROBE])
        self._health.put(MISSING, self._unproven())
        now, after = time.monotonic(), self._problems
        hours.done(visit.parts, now, sick=bool(after), new=before != after)
        if replanned:
            hours.again(now)

    def _take_tried(self, found: list[dict[str, str]]) -> None:
        self._can_try = not any(one["level"] == "warning" or "not tried" in one["what"] for one in found)
        self._health.self_probe = {"time": round(time.time(), 3), "found": [one["what"] for one in found]}
        self._health.put(TRY, [_problem(one) for one in found if one["level"] == PROBLEM])
        if self._can_try and all(one["level"] != PROBLEM for one in found):
            self._missing.tried(len(found), time.monotonic(), changed=self._host_changed)
            self._host_changed = False

    @property
    def _problems(self) -> set[tuple[str, str]]:
        return {one.problem.identity for one in self._health.of(LOOK, TRY, MISSING)}

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
        return [Problem("missing-connections", what, "tproxy-relay check", about="all")]

    def close(self) -> None:
        """Send nobody any more, and end who is there."""
        self._hours = None
        if self._visit is not None:
            self._end_visit(said_all=False)


def _problem(found: dict[str, str]) -> Problem:
    what = f"{found['what']}: {found['why']}" if found["why"] else found["what"]
    return Problem(found["name"], what, found["remedy"])


class _Visit:
    """The process, and what it has said so far."""

    def __init__(self, parts: list[str], order: dict[str, Any]) -> None:
        """Start it. Raises OSError."""
        self.parts = parts
        self.lines: list[dict[str, Any]] = []
        """Of its answer, those that are whole."""
        self.began_at = time.monotonic()
        self.until = self.began_at + TIMEOUT
        """Then it is to be ended (time.monotonic())."""
        self._rest = b""
        self._process = subprocess.Popen(
            children.module_command("tproxy_relay.check"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=children.own_environment(without=children.OF_THE_MANAGER),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        with contextlib.suppress(OSError):  # it has died already; the end of its answer tells
            self._in.write(json.dumps(order).encode() + b"\n")
            self._in.flush()

    def fileno(self) -> int:
        """Readable when it has said something, or has ended."""
        return self._out.fileno()

    def read(self) -> bool:
        """Take what it has said; False at its end."""
        chunk = os.read(self.fileno(), 65536)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        with contextlib.suppress(ValueError):
            self.lines += [json.loads(line) for line in whole]
        return bool(chunk)

    def close(self, *, at_once: bool) -> None:
        """Wait for its end, and see to it that it comes. The kernel takes away what it has made for the moment."""
        if at_once:
            self._process.kill()
        with contextlib.suppress(OSError):
            self._in.close()
        self._out.close()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
