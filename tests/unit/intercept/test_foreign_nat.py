"""Whether somebody else rewrites destinations of what arrives."""

import networks
import pytest
from plans import VARIANTS

from tproxy_relay.intercept import backends, foreign_nat, programs

pytestmark = pytest.mark.usefixtures("network")

NFT = "table inet somebodys {{ chain c {{ type nat hook {} priority {}; }}; }}"


def test_nobody_does_in_an_empty_network() -> None:
    assert not foreign_nat.rewrites_destinations()


@pytest.mark.parametrize("hook, priority, found", [("prerouting", -100, True), ("postrouting", 100, False)])
def test_in_nftables(hook: str, priority: int, found: bool) -> None:
    programs.run(["nft", "-f", "-"], NFT.format(hook, priority))
    assert foreign_nat.rewrites_destinations() is found


def test_in_iptables() -> None:
    programs.run("iptables-nft -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 81".split())
    assert foreign_nat.rewrites_destinations()


@pytest.mark.skipif(not networks.LEGACY_IPTABLES, reason="legacy iptables need the real root")
def test_in_legacy_iptables() -> None:
    programs.run("ip6tables-legacy -t nat -A POSTROUTING -j ACCEPT".split())
    assert not foreign_nat.rewrites_destinations()
    programs.run("ip6tables-legacy -t nat -A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 81".split())
    assert foreign_nat.rewrites_destinations()


@pytest.mark.parametrize("backend", ["nft", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("name", ["redirect", "beside nat"])
def test_our_own_rules_are_not_somebody_elses(name: str, backend: str) -> None:
    """Else the plan would depend on what was installed before."""
    if backend == "iptables-legacy" and not networks.LEGACY_IPTABLES:
        pytest.skip("legacy iptables need the real root")
    backends.of_name(backend).install(VARIANTS[name], "active")
    assert not foreign_nat.rewrites_destinations()
