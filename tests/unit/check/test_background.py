"""What the doctor of a running relay says of a host that others change."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doctor import PORT

from tproxy_relay import check
from tproxy_relay.check import background
from tproxy_relay.check.background import LOOK, Line, Order
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding
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


@in_network
def test_what_loses_no_connections_now_is_no_problem_of_the_relay() -> None:
    """keepalived, Docker, Kubernetes: such a host is healthy. `check` says what it is to know before a start."""
    for line in (
        "link add eth0 up type veth peer name eth1",
        "link add docker0 up type bridge nf_call_iptables 1",
        *("addr add 192.0.2.1/30 dev eth0", "addr add 192.0.2.5/30 dev docker0", "route add default dev eth0"),
    ):
        programs.run(["ip", *line.split()])
    for name in ("ip_nonlocal_bind", "ip_forward"):
        Path("/proc/sys/net/ipv4", name).write_text(str(int(name != "ip_forward")))
    for name in ("iptables", "ip6tables"):
        with contextlib.suppress(OSError):
            Path(f"/proc/sys/net/bridge/bridge-nf-call-{name}").write_text("1")
    chain = "chain c { type nat hook postrouting priority 100; masquerade; }"
    programs.run(["nft", "-f", "-"], f"table inet somebodys {{ {chain}; }}")
    settings = replace(SETTINGS, preserve_source="address")
    wanted = planning.for_host(settings)
    assert problems(list(background.carry_out(Order(settings, wanted, (LOOK,))))) == []
    found = {one.name for one in check.ask(Case(settings, wanted), check.LOSE_NOTHING_NOW) if one.level == "problem"}
    assert found == {"nonlocal-bind", "forwarding-ipv4", "masquerade"}


@in_network
def test_the_plan_is_told_before_anything_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_: Case) -> list[Finding]:
        raise AssertionError("not yet")

    before = order()
    programs.run("ip rule add pref 5250 unreachable".split())
    monkeypatch.setattr(check, "ask", never)
    assert "plan" in next(iter(background.carry_out(before)))
