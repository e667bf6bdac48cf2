"""What is wrong with the relay now, each with what mends it: told in the log when it begins and when it is over."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tproxy_relay.supervisor.respawn import DEATHS_PERIOD, Respawn
from tproxy_relay.supervisor.state import Phase, RelayState
from tproxy_relay.supervisor.worker_process import Stage

NEARLY_FULL = 0.9
"""Of max-connections."""

OWN = "relay"
"""The source of what the relay itself knows."""

RELAY, MINOR = "relay", "minor"
"""Classes of problems. relay: connections do not come, or are not served. minor: they do, and somebody should look."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """Something that is wrong."""

    name: str
    """In one word, of which there are few."""
    what: str
    """For people."""
    remedy: str = ""
    """A command that mends it; '' where it takes more than a command."""
    kind: str = RELAY
    about: str | None = None
    """Which one of that name, where `what` has numbers that change while it lasts; None: `what` says it."""

    @property
    def identity(self) -> tuple[str, str]:
        """The same as long as it is the same problem."""
        return self.name, self.what if self.about is None else self.about

    def __str__(self) -> str:
        return f"{self.what}; do: {self.remedy}" if self.remedy else self.what


class Since(NamedTuple):
    """A problem, and since when it has been there (seconds since 1970)."""

    problem: Problem
    since: float
    began_at: float
    """The same by time.monotonic(): the other clock may be set."""

    def as_json(self) -> Mapping[str, object]:
        """For the document of /status."""
        one = self.problem
        return {
            **{"name": one.name, "what": one.what, "remedy": one.remedy},
            **{"since": round(self.since, 3), "class": one.kind},
        }


class Health:
    """The problems that there are, by who has found them."""

    def __init__(self) -> None:
        self._found: dict[str, dict[tuple[str, str], Since]] = {OWN: {}}
        self.self_probe: Mapping[str, object] | None = None
        """When a connection was tried last (`time`, in seconds since 1970), and what was `found`; None: not yet."""

    def put(self, source: str, problems: Iterable[Problem], *, logs: bool = True) -> None:
        """What that source has found, in the place of what it found before. Without `logs` others have said so."""
        before, now = self._found.get(source, {}), (time.time(), time.monotonic())
        there = {}
        for one in problems:
            known = before.get(one.identity)
            there[one.identity] = Since(one, *(known[1:] if known else now))
        self._found[source] = there
        if logs:
            for key in there.keys() - before.keys():
                _say_begun(there[key].problem)
            for key in before.keys() - there.keys():
                _say_over(before[key])

    def of(self, *sources: str) -> list[Since]:
        """Those of these sources, in this order."""
        return [one for source in sources for one in self._found.get(source, {}).values()]

    @property
    def problems(self) -> list[Since]:
        """All of them, by source; those of the relay itself come first."""
        return self.of(*self._found)

    @property
    def serious(self) -> list[Problem]:
        """Those for which it is not ready."""
        return [one.problem for one in self.problems if one.problem.kind == RELAY]


def _say_begun(one: Problem) -> None:
    log.warning("degraded", extra={"problem": one.name, "what": one.what, "do": one.remedy})


def _say_over(one: Since) -> None:
    seconds = round(time.monotonic() - one.began_at)
    log.info("no longer degraded", extra={"problem": one.problem.name, "what": one.problem.what, "seconds": seconds})


def of_relay(state: RelayState, respawn: Respawn) -> Iterator[Problem]:
    """What the relay itself knows to be wrong."""
    running = state.phase is Phase.RUNNING
    if not running:
        yield Problem("state", f"the relay is {state.phase.value}", kind=MINOR)
    if running and state.interception is not None:
        yield from _of_ruleset(state)
    if running and state.missing_interface:
        text = f"interface {state.missing_interface} is not there: no client can come in until it is"
        yield Problem("interface", text)
    yield from _of_workers(state, respawn, running)
    live, most = state.workers.numbers.live, state.generation.limits.most
    if live >= most:
        text = f"full: {live} connections, max-connections is {most}; new ones wait or are refused"
        yield Problem("full", text, kind=MINOR, about="all")
    elif live >= NEARLY_FULL * most:
        yield Problem("nearly-full", f"nearly full: {live} of {most} connections", kind=MINOR, about="all")


def _of_ruleset(state: RelayState) -> Iterator[Problem]:
    assert state.interception is not None
    seen = state.interception.health
    if seen.trouble:
        yield Problem("ruleset", f"the ruleset could not be changed: {seen.trouble}")
    if seen.state != "active":
        yield Problem("ruleset", f"the ruleset is {seen.state}: new connections do not come here")


def _of_workers(state: RelayState, respawn: Respawn, running: bool) -> Iterator[Problem]:
    serving, wanted = sum(worker.stage is Stage.SERVING for worker in state.workers), state.generation.pool.size
    if running and serving < wanted:
        text = f"{serving} of {wanted} workers are at work"
        yield Problem("workers", text, kind=MINOR if serving else RELAY, about="all")
    recent_deaths = respawn.recent_deaths
    if recent_deaths:
        text = f"{recent_deaths} workers have died within {DEATHS_PERIOD:g} s; the log says how"
        yield Problem("worker-deaths", text, kind=MINOR, about="all")
    if any(worker.stalled for worker in state.workers):
        yield Problem("worker-stalls", "a worker stalls", kind=MINOR)
