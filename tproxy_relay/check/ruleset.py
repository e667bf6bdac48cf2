"""Is a ruleset of ours there, does it belong to anybody, and is it what the settings ask for?"""

from collections.abc import Iterator

from tproxy_relay.check import plan_differences
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, problem, warning
from tproxy_relay.intercept import backends, routing, ruleset

REMOVE = "tproxy-relay rules remove"
"""Finds what is ours whatever plan it was made from."""


def probe_ruleset(case: Case) -> Iterator[Finding]:
    """The ruleset against the relay that it belongs to."""
    if not case.intercepts:
        yield from _unasked(case)
        return
    now = ruleset.status(case.plan)
    if now.state == "absent":
        yield from _absent(case)
    elif case.holder is None and not case.relay_listens:
        refused = case.plan.on_failure == "closed" and now.backend is not None
        yield problem(
            "leftovers",
            f"rules of a relay that is not there ({now.backend or 'routing only'}, {now.state})",
            "new connections are refused" if refused else "they are in the way of whatever comes next",
            REMOVE,
        )
    elif now.problems and not _harmless(case):
        yield problem(
            "ruleset",
            f"the ruleset is not what these settings ask for: {_difference(case, now.problems)}",
            "some connections are not relayed, or lost",
            _again(case),
        )
    elif now.problems:
        yield ok("ruleset", f"the ruleset does no harm: {_difference(case, now.problems)}")
    else:
        held = f", held by process {case.holder}" if case.holder else ""
        yield ok("ruleset", f"the ruleset is {now.state} ({now.backend}{held})")


def _absent(case: Case) -> Iterator[Finding]:
    if case.relay_listens:
        yield problem(
            "ruleset",
            "a relay listens, and there is no ruleset",
            "nothing is intercepted",
            _again(case),
        )
    else:
        yield ok("leftovers", "no rules of a former relay")


def _unasked(case: Case) -> Iterator[Finding]:
    """Without intercept-* nothing of ours should be there."""
    found = [where.name for where in backends.present()] + routing.listing()
    if not found:
        yield ok("leftovers", "no rules of a former relay")
    elif case.holder is not None:
        yield warning(
            "ruleset",
            f"process {case.holder} holds a ruleset that these settings do not ask for",
            "check it with the settings of that relay",
        )
    elif case.relay_listens:
        yield ok("ruleset", f"a ruleset was installed by hand ({found[0]}), and a relay listens")
    else:
        yield problem(
            "leftovers",
            f"rules of a relay that is not there ({found[0]})",
            "they are in the way of whatever comes next",
            REMOVE,
        )


def _harmless(case: Case) -> bool:
    """True if the rules that are there do all that is asked for, and something more. Not if any of them is missing."""
    found = plan_differences.found(case.plan)
    if not found or not all(one.harmless for one in found):
        return False
    there = plan_differences.there(case.plan)
    return there is not None and not ruleset.status(there).problems


def _difference(case: Case, problems: list[str]) -> str:
    """In words, if it is another plan; else what is missing, or was changed."""
    there = plan_differences.digest_there()
    if there in (None, case.plan.digest):
        return problems[0]
    found = plan_differences.found(case.plan)
    if found is None:
        return "it was made with other settings (ports, addresses to listen on), or by another version"
    words = "; ".join(one.words for one in found)
    return words + ("" if not any(one.option for one in found) else " (or `check` has other settings than the relay)")


def _again(case: Case) -> str:
    """The rules of a running relay are its guard's: who changes them by hand is in its way. At a reload it plans them
    again."""
    return f"kill -HUP {case.holder}" if case.holder else case.command("rules apply")
