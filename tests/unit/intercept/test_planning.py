"""One plan for settings on a host, whoever asks for it."""

from dataclasses import replace

import pytest
from plans import PLAN, PORTS

from tproxy_relay.intercept import planning, programs
from tproxy_relay.settings import Settings

pytestmark = pytest.mark.usefixtures("network")

NAT = "table ip docker { chain pre { type nat hook prerouting priority -100; tcp dport 8000 dnat to 192.0.2.1; }; }"


def test_others_on_the_host_change_the_plan() -> None:
    settings = Settings(intercept_inbound=PORTS)
    alone = planning.for_host(settings)
    assert (alone.beside_nat, alone.route_priority) == (False, 7006)
    programs.run(["nft", "-f", "-"], NAT)
    programs.run("ip rule add pref 5250 unreachable".split())
    beside = planning.for_host(settings)
    assert (beside.beside_nat, beside.route_priority) == (True, 5247)
    assert planning.beside_others(alone) == beside
    assert planning.why(alone, beside) == (
        "somebody rewrites destinations of what arrives; rules of routing of others: ours go from 7006 to 5247"
    )
    assert "nobody rewrites" in planning.why(beside, alone)
    assert planning.why(alone, alone) == ""


def test_nat_concerns_only_what_tproxy_takes() -> None:
    programs.run(["nft", "-f", "-"], NAT)
    assert not planning.beside_others(replace(PLAN, mode="redirect")).beside_nat
    assert not planning.beside_others(replace(PLAN, inbound=())).beside_nat
