"""The ruleset as a whole: routing and rules together, installed in one go or not at all, and compared with the plan.

Packets are marked only by the rules, so routing comes first and goes last.
"""

import contextlib
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import backends, routing
from tproxy_relay.intercept.backend import Backend, Count, Step
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.programs import ProgramError
from tproxy_relay.settings import PortRange

STATES: tuple[State, ...] = ("active", "draining", "closed")


class Status(NamedTuple):
    """What the kernel has, compared with a plan."""

    state: str
    """A State, or 'absent', or 'degraded': then `problems` says why."""
    backend: str | None
    problems: list[str]
    counts: list[Count]
    routing: list[str]


class Ruleset:
    """A plan and the backend that it goes to."""

    def __init__(self, plan: Plan, where: Backend) -> None:
        self.plan = plan
        self.backend = where

    def steps(self) -> list[Step]:
        """The programs that `apply` runs on a host where nothing is there, in order, with what they read."""
        steps = []
        if self.plan.needs_routing:
            for family in self.plan.families:
                steps.append(Step(("ip", f"-{family}", "-batch", "-"), routing.batch(self.plan)))
        return steps + self.backend.steps(self.plan, "active")

    def apply(self) -> bool:
        """Install it, unless all of it is there already: then False. Raises like `install`."""
        if not self.problems("active"):
            return False
        self.install("active")
        return True

    def install(self, state: State) -> None:
        """Put it in the place of what there is of ours, and look whether it is there. On any failure things are put
        back as they were. Raises ProgramError, SystemRefusedError or CapabilityMissingError."""
        others = [other for other in backends.present() if other.name != self.backend.name]
        put_back = self.backend.remember()
        added: routing.Added = {}
        try:
            routing.install(self.plan, added)
            self.backend.install(self.plan, state)
            problems = self.backend.problems(self.plan, state) + routing.problems(self.plan, tidied=False)
            if problems:
                raise ProgramError(f"the rules were loaded, but the kernel does not have them: {problems[0]}")
        except BaseException:
            _whatever_comes(put_back)
            _whatever_comes(lambda: routing.take_back(added))
            raise
        for other in others:
            other.remove()
        routing.tidy(self.plan)

    def replace(self, plan: Plan, former: State, state: State) -> None:
        """Put another plan in the place of this one, which is installed, with no moment in which relayed connections
        are not known. On any failure this one stays, or is put back. Raises like `install`."""
        refuse_losses(self.plan, plan)
        hold, held = plan.on_failure == "open", self.plan.on_failure == "open"
        added: routing.Added = {}
        try:
            routing.install(plan, added)
            self.backend.replace(plan, state, hold=hold)
            problems = self.backend.problems(plan, state) + routing.problems(plan, tidied=False)
            if problems:
                raise ProgramError(f"the rules were loaded, but the kernel does not have them: {problems[0]}")
        except BaseException:
            _whatever_comes(lambda: self._stay(former, held))
            _whatever_comes(lambda: routing.take_back(added))
            raise
        self.plan = plan
        _whatever_comes(lambda: routing.tidy(plan))

    def _stay(self, state: State, hold: bool) -> None:
        if self.backend.problems(self.plan, state):
            self.backend.replace(self.plan, state, hold=hold)

    def restore(self, state: State) -> list[str]:
        """Put back what is gone or was changed; what that was. Raises like `install`."""
        rules, routes = self.backend.problems(self.plan, state), routing.problems(self.plan)
        if routes:
            routing.install(self.plan, {})
            routing.make_way(self.plan)
        if rules:
            self.backend.install(self.plan, state)
        return rules + routes

    def change(self, state: State) -> None:
        """Bring the installed rules into another state, relayed connections going on. Raises RelayError."""
        self.backend.change(self.plan, state)

    def problems(self, state: State) -> list[str]:
        """What is not as it should be; empty if all is well."""
        return self.backend.problems(self.plan, state) + routing.problems(self.plan)


def refuse_losses(former: Plan, plan: Plan) -> None:
    """RelayError if live connections need something of the former plan that the new one has not."""
    for loss in _losses(former, plan):
        raise RelayError(f"{loss} would end connections that the relay has: stop it and start it again")


def _losses(former: Plan, plan: Plan) -> Iterator[str]:
    """What of the former plan knows packets of relayed connections and has nothing like it in the new one."""
    for family in former.families:
        if family not in plan.families:
            yield f"no longer intercepting IPv{family}"
    if former.outbound and not plan.outbound and (former.mode == "tproxy" or not plan.inbound):
        yield "no longer intercepting anything outbound"
    if former.inbound and not plan.inbound and (former.keeps_source or not (former.mode == "tproxy" or plan.outbound)):
        yield "no longer intercepting anything inbound"
    if former.exempt_uid not in (None, plan.exempt_uid) and plan.outbound and not former.keeps_source:
        yield "another account for workers that may not mark their sockets"
    if former.keeps_source and not plan.keeps_source:
        yield "no longer preserving source addresses"
    if former.inbound and plan.keeps_source and not former.keeps_source and plan.mode == "tproxy" and plan.outbound:
        # Answers of servers here would be taken for those to a borrowed address.
        yield "preserving source addresses from now on"
    if former.preserve_source == "full" and plan.preserve_source == "address":
        yield "no longer preserving source ports"
    if former.preserve_source == "full" and not _ports(former.inbound) <= _ports(plan.inbound):
        yield "no longer intercepting some ports while source ports are preserved"


def _ports(ranges: Iterable[PortRange]) -> set[int]:
    return {port for first, last in ranges for port in range(first, last + 1)}


def remove() -> bool:
    """Take away what is there, of whatever plan and in whichever backend; True if there was anything."""
    removed = [where.remove() for where in backends.present()]
    return routing.uninstall() or any(removed)


def status(plan: Plan) -> Status:
    """What the kernel has in the way of a relay's rules, compared with that plan. Raises CapabilityMissingError without
    the right to ask."""
    found = backends.present()
    lines = routing.listing()
    if not found:
        problems = ["there are rules of routing, but none for packets"] if lines else []
        return Status("degraded" if lines else "absent", None, problems, [], lines)
    where = found[0]
    problems = [f"there are rules of {other.name} too" for other in found[1:]]
    by_state = {state: where.problems(plan, state) for state in STATES}
    state = min(STATES, key=lambda one: len(by_state[one]))
    problems += by_state[state] + (routing.problems(plan) if state != "closed" else [])
    return Status("degraded" if problems else state, where.name, problems, where.counts(), lines)


def shell_script(steps: list[Step], title: str) -> str:
    """The steps as a script that a person can read and sh can run."""
    lines = ["#!/bin/sh", *(f"# {line}" for line in title.splitlines()), "set -e"]
    for step in steps:
        lines += ["", f"{shlex.join(step.argv)} <<'END'", step.stdin.rstrip("\n"), "END"]
    return "\n".join([*lines, ""])


def _whatever_comes(step: Callable[[], None]) -> None:
    """A step of rolling back; the error that made it necessary is the one to tell."""
    with contextlib.suppress(RelayError):
        step()
