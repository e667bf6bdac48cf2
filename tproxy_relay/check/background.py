"""The doctor for a running relay: does something on this host keep connections from it, and does one come through?

The relay's supervisor starts a process for one look (__main__.py), and acts on what is found (supervisor/doctor.py). It
asks for the findings about what loses connections now; what only a start needs to know (limits, programs, the kernel)
is left out, what matters when the relay stops, and the ruleset, which has its guard.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tproxy_relay import check
from tproxy_relay.check import kernel, limits, ruleset, selfprobe, tools
from tproxy_relay.check.context import Case, Probe
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import planning
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.settings import Settings

LOOK, TRY = "look", "try"
"""What can be asked for: what others have done to this host; and a connection through the relay."""

_OF_THE_START = {module.__name__ for module in (kernel, limits, ruleset, selfprobe, tools)}

Line = dict[str, Any]
"""One of the answer: `finding`, `plan` (as it should be now, if that is another one) or `done`."""


@dataclass(frozen=True)
class Order:
    """What a process is to do."""

    settings: Settings
    plan: Plan
    """In force."""
    parts: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """As values that json.dumps() takes."""
        return {"settings": self.settings.to_json(), "plan": plans.to_json(self.plan), "parts": list(self.parts)}


def order_of(values: dict[str, Any]) -> Order:
    """The order that to_json() has described. Raises KeyError, TypeError or ValueError for anything else."""
    return Order(Settings.from_json(values["settings"]), plans.from_json(values["plan"]), values["parts"])


def carry_out(order: Order) -> Iterator[Line]:
    """The lines of the answer. No connection is tried through rules that are to be replaced first."""
    wanted = _wanted(order)
    if wanted != order.plan:
        yield _plan_line(order, wanted)
    found = list(check.ask(Case(order.settings, wanted), _probes(order, wanted)))
    if (later := _wanted(order)) != wanted:  # others were at work meanwhile
        if wanted == order.plan:
            yield _plan_line(order, later)
        found = list(check.ask(Case(order.settings, later), _probes(order, later)))
    yield from ({"finding": one.as_json()} for one in found)
    yield {"done": True}


def _plan_line(order: Order, wanted: Plan) -> Line:
    return {"plan": plans.to_json(wanted), "why": planning.why(order.plan, wanted)}


def _wanted(order: Order) -> Plan:
    if LOOK not in order.parts:
        return order.plan
    return planning.beside_others(replace(order.plan, route_priority=order.settings.route_priority))


def _probes(order: Order, wanted: Plan) -> Iterable[Probe]:
    if LOOK in order.parts:
        asked = (probe for probe in check.PROBES if probe not in check.LOSE_NOTHING_NOW)
        yield from (probe for probe in asked if probe.__module__ not in _OF_THE_START)
    if TRY in order.parts and wanted == order.plan:
        yield selfprobe.try_connections
