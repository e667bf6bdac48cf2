"""What the doctor of a running relay says of a host that others change."""

from dataclasses import replace
from typing import Any

import pytest
from doctor import PORT

from tproxy_relay.check import background
from tproxy_relay.check.background import LOOK, Line, Order
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import planning, programs
from tproxy_relay.settings import Settings

SETTINGS = Settings(intercept_inbound=(PORT,))

in_network = pytest.mark.usefixtures("network")


def order(**changed: Any) -> Order:
    return Order(SETTINGS, replace(planning.for_host(SETTINGS), **changed), (LOOK,))


def problems(lines: list[Line]) -> list[str]:
    return [line["finding"]["name"] for line in lines if "finding" in line and line["finding"]["level"] == "problem"]


def test_an_order_comes_as_it_was() -> None:
    wanted = Order(SETTINGS, plans.of_settings(SETTINGS), [LOOK])
    assert background.order_of(wanted.to_json()) == wanted
    with pytest.raises(KeyError):
        background.order_of({})


@in_network
def test_nothing_is_wrong_in_an_empty_network() -> None:
    lines = list(background.carry_out(order()))
    assert problems(lines) == [] and lines[-1] == {"done": True}
    assert not [line for line in lines if "plan" in line]
    names = {line["finding"]["name"] for line in lines if "finding" in line}
    assert "marks" in names and not names & {"ruleset", "leftovers", "nft", "ports", "memory"}


@in_network
def test_what_others_do_makes_another_plan_and_no_problem() -> None:
    before = order()
    programs.run("ip rule add pref 5250 unreachable".split())
    lines = list(background.carry_out(before))
    (found,) = (line for line in lines if "plan" in line)
    assert plans.from_json(found["plan"]) == replace(before.plan, route_priority=5247)
    assert "5247" in found["why"] and problems(lines) == []


@in_network
def test_what_cannot_be_planned_round_is_a_problem() -> None:
    before = order()
    programs.run("ip rule add pref 2 unreachable".split())
    assert problems(list(background.carry_out(before))) == ["rule-priority-ipv4"]
