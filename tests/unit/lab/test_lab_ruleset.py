"""The interception rules as text, and in the kernel."""

import socket
from typing import get_args

import pytest

from tproxy_relay.lab import Lab, Plan, Topology, ruleset

PLANS = [
    Plan(topology=topology, preserve_source=preserve) for topology in get_args(Topology) for preserve in (False, True)
]


def kernel_state(lab: Lab) -> str:
    looks = (["nft", "list", "ruleset"], ["ip", "-4", "rule"], ["ip", "-6", "rule"])
    routes = (["ip", family, "route", "show", "table", "all"] for family in ("-4", "-6"))
    return "\n".join(lab.relay.run(look).stdout for look in (*looks, *routes))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.topology}-{plan.preserve_source}")
def test_nft_takes_every_ruleset(lab: Lab, plan: Plan) -> None:
    lab.relay.run(["nft", "-c", "-f", "-"], input=ruleset.nft(plan))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.topology}-{plan.preserve_source}")
def test_intercepting_and_stopping_leaves_the_host_as_it_was(lab: Lab, plan: Plan) -> None:
    before = kernel_state(lab)
    lab.intercept((8080, "8100-8199"), topology=plan.topology, preserve_source=plan.preserve_source)
    lab.intercept((8080,), topology=plan.topology, preserve_source=plan.preserve_source)
    during = kernel_state(lab)
    assert ruleset.TABLE in during and "lookup 7006" in during and "8199" not in during
    lab.stop_intercepting()
    lab.stop_intercepting()
    assert kernel_state(lab) == before


def test_without_a_relay_intercepted_connections_go_straight_through(lab: Lab) -> None:
    lab.intercept((7000,))
    with lab.server.listen(7000) as listener, lab.client.connect(lab.server.ipv4, 7000) as client:
        server, peer = listener.accept()
        server.close()
        assert peer == client.getsockname()
    lab.stop_intercepting()


def test_only_bare_syns_are_steered_and_never_recognised_by_a_socket() -> None:
    for plan in PLANS:
        lines = ruleset.nft(plan).splitlines()
        assert all("== syn" in line for line in lines if "dport" in line)
        assert all("!= syn" in line for line in lines if "socket transparent" in line)


def test_every_routing_rule_is_bound_to_an_interface() -> None:
    for plan in PLANS:
        rules = [line for line in ruleset.routes(plan) if line.startswith("rule")]
        assert rules and all(" iif " in rule for rule in rules)


def test_marks_are_the_three_bits_of_the_mask_and_others_are_kept() -> None:
    plan = Plan(mark_mask=0x00700000)
    assert (plan.inbound_mark, plan.outbound_mark, plan.relay_mark) == (0x100000, 0x200000, 0x400000)
    assert "& 0xff8fffff | 0x00100000" in ruleset.nft(plan)
    with pytest.raises(ValueError):
        ruleset.nft(Plan(mark_mask=0x3))


def test_the_addresses_are_on_both_sides_of_the_relay(lab: Lab) -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        for address in (lab.relay.address(family), lab.relay_address(family)):
            with pytest.raises(ConnectionRefusedError):
                lab.client.connect(address, 7999)
