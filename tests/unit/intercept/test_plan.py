"""What a plan is made of, and what never gets into one."""

import dataclasses
import json
from dataclasses import replace
from typing import Any

import plans
import pytest
from hypothesis import given
from plans import PLAN

from tproxy_relay.intercept import plan as module
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.settings import PortRange, Settings

INJECTION = 'eth0"; flush ruleset; #'

HOSTILE: list[dict[str, Any]] = [
    *(
        {"interface": name}
        for name in (
            INJECTION,
            "",
            "a" * 16,
            "eth0\n",
            "eth0\nadd",
            "a b",
            "a/b",
            "ä",
            "eth0;",
            "$(id)",
            ".",
            "..",
            "a*",
        )
    ),
    *({"mark_mask": mask} for mask in (0, 1, 3, 0xF, -7, 7 << 30, 0x700000000)),
    *({"mode": mode} for mode in ("", "nat", "tproxy ")),
    *({"on_failure": word} for word in ("", "drop", "open\n")),
    {"preserve_source": INJECTION},
    *({"inbound": (PortRange(*ports),)} for ports in ((0, 1), (1, 65536), (-1, 5), (9, 5))),
    {"outbound": (PortRange(0, 80),)},
    {"inbound_port": 0},
    {"outbound_port": 65536},
    *({"listen": {4: text}} for text in ("", "::", "127.1", "127.0.0.1\n", "127.0.0.1; flush ruleset", "localhost")),
    *({"listen": {6: text}} for text in ("0.0.0.0", "fe80::1%eth0", f"fe80::1%{INJECTION}", "[::1]")),
    *({"route_table": number} for number in (0, -1, 1 << 32, 254, "7006\nroute flush table main")),
    *({"route_priority": number} for number in (0, -1, 32764, "7006\nrule flush")),
    *({"exempt_uid": number} for number in (-1, 1 << 32, "0 accept")),
]


def named(change: dict[str, Any]) -> str:
    return ascii(change)


@pytest.mark.parametrize("change", HOSTILE, ids=named)
def test_what_could_not_stand_in_a_rule_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        replace(PLAN, **change)


@pytest.mark.parametrize("change", HOSTILE, ids=named)
def test_nor_does_it_come_in_as_json(change: dict[str, Any]) -> None:
    text = json.dumps({**json.loads(module.to_json(PLAN)), **change})
    with pytest.raises((ValueError, KeyError, TypeError)):
        module.from_json(text)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"mode": "tproxy"}', '"x"'])
def test_json_that_is_no_plan(text: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        module.from_json(text)


@given(plans.ANY)
def test_json_and_back(plan: Plan) -> None:
    text = module.to_json(plan)
    assert "\n" not in text
    again = module.from_json(text)
    assert again == plan and again.digest == plan.digest
    assert again.families == plan.families and again.marks == plan.marks


@given(plans.ANY)
def test_marks(plan: Plan) -> None:
    assert all(mark.bit_count() == 1 for mark in plan.marks)
    assert list(plan.marks) == sorted(plan.marks)
    assert sum(plan.marks) == plan.mark_mask


CHANGES: dict[str, Any] = {
    "mode": "redirect",
    "inbound": (),
    "outbound": (PortRange(8000, 8101),),
    "inbound_port": 1,
    "outbound_port": 1,
    "listen": {4: "0.0.0.0"},
    "interface": "eth0",
    "preserve_source": "address",
    "on_failure": "closed",
    "mark_mask": 0x0E000000,
    "route_table": 7,
    "route_priority": 7,
    "exempt_uid": 0,
    "beside_nat": True,
}


def test_the_digest_changes_with_each_field() -> None:
    assert set(CHANGES) == {field.name for field in dataclasses.fields(Plan)}
    digests = {PLAN.digest, *(replace(PLAN, **{name: value}).digest for name, value in CHANGES.items())}
    assert len(digests) == 1 + len(CHANGES)
    assert replace(PLAN).digest == PLAN.digest and len(PLAN.digest) == 8


def test_what_a_plan_says_of_itself() -> None:
    assert PLAN.listener_ports == {15006, 15002}
    assert replace(PLAN, inbound=()).listener_ports == {15002}
    assert replace(PLAN, outbound=()).listener_ports == {15006}
    assert PLAN.families == (4, 6) and replace(PLAN, listen={6: "::1", 4: "0.0.0.0"}).families == (4, 6)
    assert PLAN.on_address(4) is None and PLAN.on_address(6) is None
    assert replace(PLAN, listen={6: "::1"}).on_address(6) == "::1"
    assert not PLAN.keeps_source and replace(PLAN, preserve_source="address").keeps_source


@pytest.mark.parametrize(
    "mode, preserve, needed", [("tproxy", "no", True), ("redirect", "no", False), ("redirect", "full", True)]
)
def test_routing_is_for_packets_with_foreign_addresses(mode: str, preserve: str, needed: bool) -> None:
    assert replace(PLAN, mode=mode, preserve_source=preserve).needs_routing is needed


@pytest.mark.parametrize(
    "bind, expected",
    [
        (("0.0.0.0",), {4: "0.0.0.0"}),
        (("::",), {6: "::"}),
        (("192.0.2.1", "127.0.0.1", "0.0.0.0", "::1", "2001:db8::1"), {4: "0.0.0.0", 6: "::1"}),
        (("192.0.2.1", "127.0.0.1"), {4: "127.0.0.1"}),
        (("192.0.2.2", "192.0.2.1"), {4: "192.0.2.2"}),
    ],
)
@pytest.mark.usefixtures("ipv6_loopback")
def test_one_listening_address_of_each_family(bind: tuple[str, ...], expected: dict[int, str]) -> None:
    assert module.of_settings(Settings(bind=bind)).listen == expected


def test_a_kernel_without_ipv6_has_no_ipv6_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_kernel_has_ipv6", lambda: False)
    assert module.of_settings(Settings()).families == (4,)


def test_the_plan_says_what_the_settings_say() -> None:
    settings = Settings(
        bind=("192.0.2.1",),
        mode="redirect",
        interface="eth0",
        intercept_inbound=(),
        intercept_outbound=(PortRange(8000, 8101),),
        inbound_port=1,
        outbound_port=2,
        preserve_source="address",
        on_failure="closed",
        mark_mask=0x0E000000,
        route_table=7,
        route_priority=8,
        user="0",
    )
    assert module.of_settings(settings) == Plan(
        mode="redirect",
        inbound=(),
        outbound=(PortRange(8000, 8101),),
        inbound_port=1,
        outbound_port=2,
        listen={4: "192.0.2.1"},
        interface="eth0",
        preserve_source="address",
        on_failure="closed",
        mark_mask=0x0E000000,
        route_table=7,
        route_priority=8,
        exempt_uid=0,
    )


def test_somebody_elses_nat_matters_to_what_arrives_with_its_own_address() -> None:
    inbound = Settings(intercept_inbound=PLAN.inbound)
    assert module.of_settings(inbound, beside_nat=True).beside_nat
    assert not module.of_settings(inbound).beside_nat
    assert not module.of_settings(replace(inbound, mode="redirect"), beside_nat=True).beside_nat
    assert not module.of_settings(Settings(intercept_outbound=PLAN.outbound), beside_nat=True).beside_nat


def test_no_account_is_exempt_unless_there_is_one() -> None:
    assert module.of_settings(Settings()).exempt_uid is None
