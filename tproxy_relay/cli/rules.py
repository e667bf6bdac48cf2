"""`tproxy-relay rules show | apply | remove | status`: the ruleset by hand.

What `apply` installs is held by nobody and stays until `remove`. A running relay that holds a ruleset of its own
(`run` with intercept-inbound or intercept-outbound) keeps these two out.
"""

import json

from tproxy_relay.cli.arguments import Arguments
from tproxy_relay.intercept import backends, lock, planning, ruleset
from tproxy_relay.intercept.lock import Holder, Lock
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.intercept.ruleset import Ruleset, Status
from tproxy_relay.net import proc_net
from tproxy_relay.settings import Settings


def run(settings: Settings, arguments: Arguments) -> int:
    """Do what `arguments.action` says and print the answer. Returns the exit code; raises RelayError."""
    wanted = planning.for_host(settings)
    if arguments.action == "show":
        return _show(wanted, settings, arguments.json)
    if arguments.action == "apply":
        return _apply(wanted, settings, arguments.json)
    return _remove(arguments.json) if arguments.action == "remove" else _status(wanted, arguments.json)


def _show(wanted: Plan, settings: Settings, as_json: bool) -> int:
    where = backends.of_name(settings.backend) if settings.backend != "auto" else backends.preferred()
    steps = Ruleset(wanted, where).steps()
    if as_json:
        print(json.dumps({"backend": where.name, "steps": [step._asdict() for step in steps]}))
    else:
        title = f"The interception ruleset of tproxy-relay, plan {wanted.digest}, for {where.name}.\n"
        print(ruleset.shell_script(steps, title + "`tproxy-relay rules remove` takes it away again."), end="")
    return 0


def _apply(wanted: Plan, settings: Settings, as_json: bool) -> int:
    warnings: list[str] = []
    with Lock():
        where = backends.choose(settings.backend, wanted, warn=warnings.append)
        changed = Ruleset(wanted, where).apply()
    done = f"{'applied' if changed else 'already applied'} with {where.name}: {_summary(wanted)}"
    _answer(done, warnings, as_json)
    return 0


def _remove(as_json: bool) -> int:
    with Lock():
        removed = ruleset.remove()
    _answer("removed" if removed else "there was nothing to remove", [], as_json)
    return 0


def _status(wanted: Plan, as_json: bool) -> int:
    now, holder = ruleset.status(wanted), lock.holder()
    listeners = _listeners(wanted)
    problems = now.problems + [f"nothing listens on port {port}" for port, there in listeners.items() if not there]
    state = "degraded" if problems and now.state != "absent" else now.state
    if as_json:
        print(
            json.dumps(
                {
                    "state": state,
                    "backend": now.backend,
                    "problems": problems,
                    "rules": [count._asdict() for count in now.counts],
                    "routing": now.routing,
                    "listeners": [{"port": port, "listening": there} for port, there in listeners.items()],
                    "holder": holder.pid if holder else None,
                }
            )
        )
    else:
        print("\n".join(_report(state, now, problems, listeners, holder)))
    return 0 if state in ("active", "draining") else 1


def _report(
    state: str, now: Status, problems: list[str], listeners: dict[int, bool], holder: Holder | None
) -> list[str]:
    held = f", held by process {holder.pid}" if holder else ""
    lines = [f"ruleset: {state}{f' ({now.backend})' if now.backend else ''}{held}"]
    lines += [f"problem: {problem}" for problem in problems]
    lines += [f"listener: port {port}, {'listening' if there else 'nobody'}" for port, there in listeners.items()]
    lines += now.routing
    for count in now.counts:
        packets = "-" if count.packets is None else str(count.packets)
        lines.append(f"{packets:>12} packets  {count.family} {count.chain}: {count.label}")
    return lines


def _listeners(wanted: Plan) -> dict[int, bool]:
    """The listeners that the plan sends connections to, and whether something listens there."""
    there = proc_net.listening_ports()
    return {port: port in there for port in sorted(wanted.listener_ports)}


def _summary(wanted: Plan) -> str:
    parts = []
    for name, ranges, port in (
        ("inbound", wanted.inbound, wanted.inbound_port),
        ("outbound", wanted.outbound, wanted.outbound_port),
    ):
        if ranges:
            parts.append(f"{name} {','.join(map(str, ranges))} to {port}")
    return "; ".join(parts)


def _answer(done: str, warnings: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"done": done, "warnings": warnings}))
    else:
        print("\n".join([*(f"warning: {line}" for line in warnings), done]))
