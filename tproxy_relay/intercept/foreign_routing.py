"""Do rules of routing of others come before ours, and send our packets elsewhere? The catch-all of a VPN does.

Ours are about marked packets only, so they may stand anywhere. They go before the first of such rules, if there is room
behind the kernel's own rule for local addresses, which is the first (ip-rule(8)).
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import routing
from tproxy_relay.intercept.plan import Plan

Rule = dict[str, Any]
"""A rule of routing, or a route, as `ip -N -json` tells of it."""

RULES = 3
"""Priorities that ours take, one after the other (routing.py)."""

_OF_THE_KERNEL = (0, 32766, 32767)
"""ip-rule(8): the priorities of the rules that are there from the beginning."""

_DEAD_ENDS = {"6", "7", "8"}
"""linux/rtnetlink.h: RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT."""

_ALL_BITS = 0xFFFFFFFF


def priority(plan: Plan) -> int:
    """Where the first of our rules should stand on this host: where the plan has it, or before the first rule of others
    that would take our packets. Where the plan has it too if no room is left there."""
    if not plan.needs_routing:
        return plan.route_priority
    before: set[int] = set()
    taken: set[int] = set()
    for family in plan.families:
        routes = partial(routing.ask, family, "route", "show", "table")
        with contextlib.suppress(RelayError):  # without `ip` nothing is installed anyway
            for one in foreign(routing.ask(family, "rule", "show")):
                taken.add(one["priority"])
                if one["priority"] < plan.route_priority + RULES and diverts(plan, one, routes):
                    before.add(one["priority"])
    for first in range(min(before, default=0) - RULES, 0, -1):
        if taken.isdisjoint(range(first, first + RULES)):
            return first
    return plan.route_priority


def foreign(rules: Sequence[Rule]) -> list[Rule]:
    """All but a relay's, and the three that the kernel begins with."""
    ours = str(routing.PROTOCOL)
    return [one for one in rules if one["priority"] not in _OF_THE_KERNEL and one.get("protocol") != ours]


def diverts(plan: Plan, one: Rule, routes: Callable[[str], Sequence[Rule]]) -> bool:
    """True if a packet with one of our marks, and any bits of others, could match this rule and would not come to ours.
    `routes` are those of a table."""
    if _spares(plan, one, known=plan.mark_mask):
        return False
    if one.get("action") in _DEAD_ENDS:
        return True
    if "table" not in one:
        return False
    shortest: int = one.get("suppress_prefixlen", -1)
    return any(_prefix_length(route) > shortest for route in routes(str(one["table"])))


def is_for_bits_of_others(plan: Plan, one: Rule) -> bool:
    """True if none of our packets matches it before others have set bits of its mark."""
    return _spares(plan, one, known=_ALL_BITS)


def _spares(plan: Plan, one: Rule, *, known: int) -> bool:
    """True if it matches none of our packets, whatever the other bits of their marks are."""
    if "fwmark" not in one:
        return False
    value, mask = fwmark(one)
    equal = [(mark ^ value) & mask & known == 0 for mark in (plan.marks.inbound, plan.marks.outbound)]
    if "not" in one:
        return all(equal) and not mask & ~known & _ALL_BITS
    return not any(equal)


def fwmark(one: Rule) -> tuple[int, int]:
    """Value and mask of the mark that a rule asks for."""
    return int(str(one["fwmark"]), 0), int(str(one.get("fwmask", hex(_ALL_BITS))), 0)


def _prefix_length(route: Rule) -> int:
    destination = str(route.get("dst", "default"))
    if destination == "default":
        return 0
    _, slash, length = destination.partition("/")
    return int(length) if slash else 128
