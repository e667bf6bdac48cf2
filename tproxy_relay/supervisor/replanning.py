"""The ruleset is planned again where others on this host have made another plan the right one; the workers go on."""

import logging
import os
import time
from collections import deque
from dataclasses import replace

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.supervisor.health import Health, Problem
from tproxy_relay.supervisor.state import RelayState

MOST, PERIOD = 5, 600.0
"""So often within so many seconds; then it is somebody else's turn to see who changes this host again and again."""

ANSWER_TIMEOUT = 10.0
"""Seconds for the guard, which takes a tenth of one, and waits for other programs' locks. The supervisor waits with it,
and its service manager for the supervisor (WatchdogSec in etc/systemd)."""

log = logging.getLogger(__name__)


class Replanning:
    """How often it was done, and whether to do it once more."""

    def __init__(self, state: RelayState, health: Health) -> None:
        self._state = state
        self._health = health
        self._times: deque[float] = deque(maxlen=MOST)

    def settled(self) -> None:
        """The plan in force is the right one."""
        self._health.put("replanning", [])

    def follow(self, plan: Plan, why: str) -> bool:
        """Put this plan in the place of that in force, for this reason. False if that was not done, and is to be tried
        again."""
        state, now = self._state, time.monotonic()
        if state.busy is not None or state.interception is None or state.interception.health.state != "active":
            return False
        if len(self._times) == MOST and now - self._times[0] < PERIOD:
            what = f"somebody changes this host again and again, and the ruleset stays as it is ({why})"
            one = Problem("host-changes", what, f"kill -HUP {os.getpid()}", about="all")
            self._health.put("replanning", [one])
            return False
        try:
            state.interception.replace(plan, ANSWER_TIMEOUT)
        except RelayError as error:
            self._health.put("replanning", [Problem("replanning", f"the ruleset cannot be planned again: {error}")])
            return False
        self._times.append(now)
        state.current = replace(state.generation, plan=plan)
        self.settled()
        log.warning("ruleset planned again", extra={"why": why, "plan": plan.digest})
        return True
