"""Whose NAT comes before ours."""

import shlex

import networks
import pytest
from doctor import case, levels
from plans import PORTS

from tproxy_relay.check import foreign_nat
from tproxy_relay.check.context import Case
from tproxy_relay.intercept import planning, programs

pytestmark = pytest.mark.usefixtures("network")

NAT = "table ip docker {{ chain pre {{ type nat hook prerouting priority {}; tcp dport 443 dnat to 192.0.2.1; }}; }}"


def of(backend: str) -> Case:
    settings = case(intercept_inbound=PORTS, backend=backend).settings
    return Case(settings, planning.for_host(settings))


def test_without_nat_of_others_there_is_nothing_to_keep_off() -> None:
    assert not [*foreign_nat.probe_nat(of("nft"))]


@pytest.mark.parametrize(
    "backend, priority, level",
    [
        ("nft", "-100", "ok"),
        ("nft", "-110", "problem"),
        ("iptables-nft", "-100", "problem"),
        ("iptables-legacy", "-100", "problem"),
        ("iptables-nft", "-90", "ok"),
    ],
)
def test_who_comes_first_is_spared_our_packets(backend: str, priority: str, level: str) -> None:
    programs.run(["nft", "-f", "-"], NAT.format(priority))
    found = [*foreign_nat.probe_nat(of(backend))]
    assert levels(found) == [("nat", level)]
    if level == "problem":
        programs.run(shlex.split(found[0].remedy))
        assert levels([*foreign_nat.probe_nat(of(backend))]) == [("nat", "ok")]
        assert "dnat" in programs.run("nft list chain ip docker pre".split()).stdout, "others keep theirs"


@pytest.mark.skipif(not networks.LEGACY_IPTABLES, reason="legacy iptables need the real root")
@pytest.mark.parametrize("backend, level", [("iptables-legacy", "ok"), ("iptables-nft", "problem")])
def test_in_the_same_table_ours_are_in_front(backend: str, level: str) -> None:
    programs.run("iptables-legacy -t nat -A PREROUTING -p tcp --dport 443 -j DNAT --to-destination 192.0.2.1".split())
    assert levels([*foreign_nat.probe_nat(of(backend))]) == [("nat", level)]
