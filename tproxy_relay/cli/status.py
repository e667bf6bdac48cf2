"""`tproxy-relay status`: what a running relay says of itself, for people and for scripts."""

from collections.abc import Iterator, Mapping
from typing import Any

from tproxy_relay.admin import client
from tproxy_relay.cli import output
from tproxy_relay.cli.humanize import amount, clock, lasted, refusal
from tproxy_relay.settings import Settings

DEGRADED = 1
"""Exit code of `status` for a relay that runs and has something to complain of."""

Document = Mapping[str, Any]


def run(settings: Settings, *, as_json: bool) -> int:
    """Ask, print, and return the exit code. Raises RelayError; NoRelayError if there is none."""
    status = client.find(settings).get("/status")
    output.answer(status, status_lines(status), as_json)
    return 0 if status["health"] == "ok" else DEGRADED


def status_lines(status: Document) -> Iterator[str]:
    """The document of /status for people. Facts that say nothing are left out."""
    yield (
        f"tproxy-relay {status['version']}, process {status['pid']}: {status['state']} for "
        f"{lasted(status['uptime_seconds'])}, {status['health']}"
    )
    for complaint in status["complaints"]:
        yield f"  ! {complaint}"
    for name, text in _facts(status):
        yield f"{name:<14}{text}"


def _facts(status: Document) -> Iterator[tuple[str, str]]:
    connections, rates, sent = status["connections"], status["rates"], status["bytes"]
    last = connections["seconds_since_last"]
    when = "none has come yet" if last is None else f"the last one came {lasted(last)} ago"
    yield "connections", (
        f"{connections['active']:,} now (at most {connections['most']:,}), {connections['accepted']:,} so far; "
        f"{rates['accepted']:.1f} new a second; {when}"
    )
    yield "bytes", (
        f"to servers {amount(sent['up'])} ({amount(rates['bytes_up'])}/s), "
        f"to clients {amount(sent['down'])} ({amount(rates['bytes_down'])}/s)"
    )
    closed = sorted(connections["closed"].items(), key=lambda pair: -int(pair[1]))
    if closed:
        yield "ended", ", ".join(f"{outcome} {count:,}" for outcome, count in closed)
    for name, key in (("connecting", "connect_seconds"), ("lasting", "duration_seconds")):
        lengths = status[key]
        if lengths["count"]:
            parts = (f"{part}% {_at_most(lengths[f'p{part}'])}" for part in (50, 90, 99))
            yield name, ", ".join(parts)
    yield "ruleset", _ruleset(status["ruleset"])
    tried = status.get("self_probe")  # a relay of an earlier version does not say
    if tried:
        yield "self-probe", f"{clock(tried['time'])} {'; '.join(tried['found'])}"
    waiting = [f"{one['waiting']} at {one['name']}" for one in status["listeners"] if one["waiting"]]
    overflows = f"; {status['listen_overflows']} lost on this host" if status["listen_overflows"] else ""
    yield "in backlog", (", ".join(waiting) or "nobody") + overflows
    yield "workers", ", ".join(
        f"process {one['pid']}: {one['active']:,} of {one['room']:,}"
        + (" (leaving)" if one["state"] == "leaving" else "")
        for one in status["workers"]
    )
    counts = ("worker_deaths", "reloads", "reloads_refused", "log_dropped")
    since = [f"{key.replace('_', ' ')} {status[key]}" for key in counts if status[key]]
    if since:
        yield "since start", ", ".join(since)
    if status["silent"]:
        yield "silent", "workers that did not answer: " + ", ".join(map(str, status["silent"]))
    yield from _titled("last refused", map(refusal, status["last_refused"][:5]))
    yield from _titled("last problems", map(_problem, reversed(status["last_problems"][-5:])))


def _titled(title: str, lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        yield title, line
        title = ""


def _ruleset(health: Document | None) -> str:
    if health is None:
        return "none of this relay's: `tproxy-relay rules status` looks at one that was made by hand"
    trouble = f"; {health['trouble']}" if health["trouble"] else ""
    return f"{health['state']} ({health['backend']}){trouble}"


def _problem(line: Document) -> str:
    fields = "".join(f" {name}={value}" for name, value in line.items() if name not in ("time", "level", "message"))
    return f"{clock(line['time'])} {line['message']}{fields}"


def _at_most(seconds: float | None) -> str:
    return "longer than all bounds" if seconds is None else f"within {lasted(seconds)}"
