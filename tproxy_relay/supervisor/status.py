"""The document of /status, made from what the supervisor knows. docs/looking-in.rst has its fields."""

import os
import time
from collections.abc import Sequence
from typing import NamedTuple

from tproxy_relay import __version__
from tproxy_relay.admin.history import History
from tproxy_relay.guard.guard_client import Health
from tproxy_relay.ipc.histogram import Histogram
from tproxy_relay.ipc.scoreboard import Numbers, Traffic
from tproxy_relay.logs.recent import Problems
from tproxy_relay.net import listeners
from tproxy_relay.outcome import Outcome
from tproxy_relay.supervisor.generation import Prepared
from tproxy_relay.supervisor.worker_process import WorkerProcess
from tproxy_relay.supervisor.workers import DEATHS_PERIOD

NEARLY_FULL = 0.9
"""Of max-connections."""


class Facts(NamedTuple):
    """At one moment."""

    started: float
    """time.time()"""
    state: str
    prepared: Prepared
    workers: Sequence[WorkerProcess]
    numbers: Numbers
    traffic: Traffic
    log_dropped: int
    deaths: int
    recent_deaths: int
    """Within DEATHS_PERIOD."""
    reloads: int
    reloads_refused: int
    overflows: int
    """Of the listeners of this host, since the start."""
    health: Health | None
    """Of the ruleset; None if this relay has none."""
    history: History
    problems: Problems


def document(facts: Facts) -> dict[str, object]:
    """All of it, as JSON takes it."""
    now, limits = time.time(), facts.prepared.spec.limits
    complaints = list(_complaints(facts))
    last = facts.history.last_accepted
    return {
        "version": __version__,
        "pid": os.getpid(),
        "started": round(facts.started, 3),
        "uptime_seconds": round(now - facts.started, 3),
        "state": facts.state,
        "health": "degraded" if complaints else "ok",
        "complaints": complaints,
        "connections": {
            "accepted": facts.numbers.accepted,
            "active": facts.numbers.live,
            "closed": facts.numbers.closed,
            "most": limits.most,
            "seconds_since_last": None if last is None else round(max(0.0, now - last), 1),
        },
        "bytes": {"up": facts.traffic.bytes_up, "down": facts.traffic.bytes_down},
        "rates": facts.history.rates(),
        "connect_seconds": _lengths(facts.traffic.connect),
        "duration_seconds": _lengths(facts.traffic.duration),
        "listeners": [
            {"name": one.name, "waiting": waiting, "backlog": backlog}
            for one in facts.prepared.listeners
            for waiting, backlog in [listeners.backlog(one)]
        ],
        "listen_overflows": facts.overflows,
        "workers": [
            {
                "pid": worker.pid,
                "generation": worker.generation,
                "state": "leaving" if worker.leaving else "serving" if worker.serving else "starting",
                "accepted": numbers.accepted,
                "active": numbers.live,
                "closed": numbers.closed,
                "bytes": {"up": traffic.bytes_up, "down": traffic.bytes_down},
                "room": limits.room,
            }
            for worker in facts.workers
            for numbers, traffic in [(worker.numbers, worker.traffic)]
        ],
        "worker_deaths": facts.deaths,
        "reloads": facts.reloads,
        "reloads_refused": facts.reloads_refused,
        "log_dropped": facts.log_dropped,
        "ruleset": None if facts.health is None else facts.health._asdict(),
        "last_problems": facts.problems.last,
    }


def _complaints(facts: Facts) -> "list[str]":
    """What an operator should know of, in words."""
    found = []
    health, limits = facts.health, facts.prepared.spec.limits
    if facts.state != "running":
        found.append(f"the relay is {facts.state}")
    if health is not None and facts.state == "running":
        if health.trouble:
            found.append(f"the ruleset could not be changed: {health.trouble}")
        if health.state != "active":
            found.append(f"the ruleset is {health.state}: new connections do not come here")
    serving = sum(worker.serving and not worker.leaving for worker in facts.workers)
    if facts.state == "running" and serving < facts.prepared.workers:
        found.append(f"{serving} of {facts.prepared.workers} workers are at work")
    if facts.recent_deaths:
        found.append(f"{facts.recent_deaths} workers have died within {DEATHS_PERIOD:g} s; the log says how")
    if any(worker.stalled for worker in facts.workers):
        found.append("a worker stalls")
    if facts.numbers.live >= limits.most:
        found.append(
            f"full: {facts.numbers.live} connections, max-connections is {limits.most}; new ones wait or are refused"
        )
    elif facts.numbers.live >= NEARLY_FULL * limits.most:
        found.append(f"nearly full: {facts.numbers.live} of {limits.most} connections")
    return found


def _lengths(histogram: Histogram) -> dict[str, object]:
    """The buckets, and what one wants to know of them. None where a percentile lies above the last bound."""
    quantiles = {f"p{part}": histogram.quantile(part / 100) for part in (50, 90, 99)}
    return {
        "count": histogram.total,
        "sum": round(histogram.seconds, 6),
        **{name: value if value != float("inf") else None for name, value in quantiles.items()},
        "buckets": [[bound, count] for bound, count in zip((*histogram.bounds, None), histogram.counts)],
    }


def failed(numbers: Numbers) -> int:
    """Connections that did not end as TCP connections do: those with a warning in the log."""
    return sum(count for outcome, count in numbers.closed.items() if not Outcome(outcome).ordinary)
