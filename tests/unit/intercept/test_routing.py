"""The rules of routing: their words, and their life beside those of others."""

from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import children
import pytest
from plans import PLAN, VARIANTS

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.intercept import programs, routing
from tproxy_relay.intercept.plan import Family, Plan

FAMILIES: tuple[Family, ...] = (4, 6)


def test_the_words() -> None:
    assert routing.rules(PLAN) == [
        "pref 7006 fwmark 0x1000000/0x7000000 iif lo goto 7008 protocol 206",
        "pref 7006 fwmark 0x2000000/0x7000000 iif lo lookup 7006 protocol 206",
        "pref 7007 fwmark 0x1000000/0x7000000 lookup 7006 protocol 206",
        "pref 7008 nop protocol 206",
    ]
    assert routing.rules(replace(PLAN, mark_mask=0x80000101, route_table=9, route_priority=1)) == [
        "pref 1 fwmark 0x1/0x80000101 iif lo goto 3 protocol 206",
        "pref 1 fwmark 0x100/0x80000101 iif lo lookup 9 protocol 206",
        "pref 2 fwmark 0x1/0x80000101 lookup 9 protocol 206",
        "pref 3 nop protocol 206",
    ]
    assert routing.batch(PLAN).splitlines() == [
        "route add local default dev lo table 7006 proto 206",
        *(f"rule add {rule}" for rule in routing.rules(PLAN)),
    ]


def test_what_would_leave_unrelayed_is_refused_if_it_must_not() -> None:
    closed = replace(PLAN, on_failure="closed")
    assert routing.refusal(closed) == ["pref 7007 fwmark 0x2000000/0x7000000 iif lo unreachable protocol 206"]
    assert routing.rules(closed) == routing.rules(PLAN)
    for other in (PLAN, replace(closed, outbound=()), replace(VARIANTS["redirect"], on_failure="closed")):
        assert routing.refusal(other) == []


def ip(words: str) -> str:
    return programs.run(["ip", *words.split()]).stdout


def everything() -> list[str]:
    return [ip(f"-{family} {what}") for family in FAMILIES for what in ("rule", "route show table all")]


in_network = pytest.mark.usefixtures("network")


@in_network
@pytest.mark.parametrize(
    "plan",
    [VARIANTS["mask"], replace(PLAN, route_table=0xFFFFFFFF, route_priority=32763), replace(PLAN, route_priority=1)],
)
def test_it_comes_once_and_goes_without_a_trace(plan: Plan) -> None:
    for words in ("rule add pref 7006 fwmark 0x1000000/0x7000000 lookup main", "rule add pref 7007 lookup 7006"):
        ip(words)
    ip("route add 192.0.2.0/24 dev lo table 99")
    before = everything()
    assert routing.listing() == [] and not routing.uninstall()
    routing.install(plan, {})
    assert [routing.missing(plan, family) for family in FAMILIES] == [[], []]
    assert len(routing.listing()) == 10
    installed, added = everything(), {}
    routing.install(plan, added)
    assert everything() == installed and not any(added.values())
    assert routing.uninstall() and not routing.uninstall()
    assert everything() == before


@in_network
def test_only_the_families_of_the_plan_and_only_if_needed() -> None:
    routing.install(VARIANTS["redirect"], {})
    assert routing.listing() == []
    routing.install(VARIANTS["IPv6"], {})
    assert len(routing.listing()) == 5 and all(line.startswith("ip -6 ") for line in routing.listing())


@in_network
def test_what_is_gone_is_missing_and_comes_back() -> None:
    routing.install(PLAN, {})
    whole = routing.listing()
    for family in FAMILIES:
        for line in routing.batch(PLAN).splitlines():
            ip(f"-{family} {line.replace(' add ', ' del ', 1)}")
            assert routing.missing(PLAN, family) == [line]
            added: routing.Added = {}
            routing.install(PLAN, added)
            assert added[family] == [line]
            assert sorted(routing.listing()) == sorted(whole)


def switch_ipv6(on: bool) -> None:
    programs.run(["sysctl", "-q", "-w", f"net.ipv6.conf.all.disable_ipv6={int(not on)}"])


@in_network
def test_while_ipv6_is_off_a_refusal_stands_in_for_its_route() -> None:
    closed = replace(PLAN, on_failure="closed")
    route, refusal = routing.batch(closed).splitlines()[0], f"rule add {routing.refusal(closed)[0]}"
    switch_ipv6(False)
    assert not routing.ipv6_is_on()
    for _ in range(2):
        routing.install(closed, {})
        routing.make_way(closed)
        routing.tidy(closed)
        assert routing.problems(closed) == []
        assert len(routing.listing()) == 10 and f"ip -6 {refusal.replace(' add ', ': ')}" in routing.listing()
        switch_ipv6(True)
        assert routing.ipv6_is_on() and routing.missing(closed, 6) == [route]
        routing.make_way(closed)
        routing.tidy(closed)
        assert routing.missing(closed, 6) == [route], "it stays until the route is there"
        routing.install(closed, {})
        assert routing.problems(closed, tidied=False) == []
        assert routing.problems(closed) == [f"ip -6: '{refusal.replace(' add ', ' ')}' is in the way"]
        routing.make_way(closed)
        assert routing.problems(closed) == [] and len(routing.listing()) == 10
        assert not any("unreachable" in line for line in routing.listing())
        switch_ipv6(False)
        assert routing.missing(closed, 6) == [refusal]
    assert routing.uninstall() and routing.listing() == []


@in_network
def test_the_refusal_of_a_former_plan_is_tidied_away() -> None:
    closed = replace(PLAN, on_failure="closed")
    switch_ipv6(False)
    for plan in (PLAN, replace(closed, outbound=()), replace(closed, listen=VARIANTS["IPv4"].listen)):
        routing.install(closed, {})
        assert any("unreachable" in line for line in routing.listing())
        routing.install(plan, {})
        routing.tidy(plan)
        assert not any("unreachable" in line for line in routing.listing())
        assert routing.problems(plan) == []


@in_network
def test_ipv6_that_has_a_route_and_no_address_is_left_as_it_is() -> None:
    closed = replace(PLAN, on_failure="closed")
    routing.install(closed, {})
    ip("-6 addr flush dev lo")
    assert not routing.ipv6_is_on() and routing.problems(closed) == []


IS_ON = "from tproxy_relay.intercept import routing; print(routing.ipv6_is_on())"


@pytest.mark.parametrize("on", [True, False])
def test_whether_ipv6_is_on_without_proc_net(on: bool, require_or_skip: Callable[[str], NoReturn]) -> None:
    hide = "mount -t proc -o subset=pid proc /proc"
    switch = f"sysctl -q -w net.ipv6.conf.all.disable_ipv6={int(not on)}"
    network = "ip link set lo up && sysctl -q -w net.ipv6.conf.lo.disable_ipv6=0"
    prefix = ("unshare", "-nm", "sh", "-c", f'{network} && {switch} && {hide} && exec "$@"', "sh")
    done = children.run_python(IS_ON, prefix=children.need(prefix, require_or_skip))
    assert done.stdout.strip() == str(on), done.stderr


@in_network
def test_an_install_is_taken_back_without_what_was_there_before() -> None:
    routing.install(VARIANTS["IPv4"], {})
    before, added = everything(), {}
    routing.install(PLAN, added)
    routing.take_back(added)
    assert everything() == before


@in_network
def test_what_another_plan_left_is_tidied_away() -> None:
    other = replace(PLAN, route_table=9, route_priority=100, mark_mask=7)
    routing.install(other, {})
    routing.install(PLAN, {})
    assert len(routing.listing()) == 20
    routing.tidy(PLAN)
    assert len(routing.listing()) == 10 and routing.missing(PLAN, 4) == routing.missing(PLAN, 6) == []


@in_network
@pytest.mark.parametrize("family, route", [(4, "192.0.2.0/24"), (6, "2001:db8::/64")])
def test_a_table_of_somebody_else_is_left_alone(family: Family, route: str) -> None:
    ip(f"-{family} route add {route} dev lo table 7006")
    before = everything()
    with pytest.raises(SystemRefusedError, match=f"routing table 7006 has a route to {route} .*--route-table"):
        routing.install(PLAN, {})
    assert everything() == before


@in_network
@pytest.mark.parametrize("families", [(4, 6), (4,), (6,)])
def test_lo_that_is_down_is_named(families: tuple[Family, ...]) -> None:
    ip("link set lo down")
    plan = replace(PLAN, listen={one: PLAN.listen[one] for one in families})
    with pytest.raises(SystemRefusedError, match="interface lo is down.*ip link set lo up"):
        routing.install(plan, {})
    ip("link set lo up")
    routing.install(plan, {})
