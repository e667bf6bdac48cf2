"""Rules by iptables, in a network of the test's own."""

import pytest
from plans import PLAN, VARIANTS

from tproxy_relay.intercept import programs
from tproxy_relay.intercept.backend_iptables import Iptables

pytestmark = pytest.mark.usefixtures("network")


def tables() -> str:
    return programs.run(["nft", "list", "tables"]).stdout


def test_what_is_shown_for_iptables_takes_the_place_of_what_is_there() -> None:
    where = Iptables("-nft")
    where.install(VARIANTS["inbound"], "active")
    for step in where.steps(PLAN, "active"):
        programs.run(step.argv, step.stdin)
    assert where.problems(PLAN, "active") == []


def test_tables_that_it_made_go_with_the_rules() -> None:
    where = Iptables("-nft")
    assert tables() == "" and where.reports_changes
    where.install(PLAN, "active")
    assert "table ip mangle" in tables()
    assert where.remove() and tables() == ""
    assert not where.remove()


def test_tables_that_others_made_stay() -> None:
    programs.run("iptables-nft -t mangle -A PREROUTING -p udp -j ACCEPT".split())
    before = programs.run(["iptables-nft-save"]).stdout
    where = Iptables("-nft")
    where.install(PLAN, "active")
    where.remove()
    assert [line for line in programs.run(["iptables-nft-save"]).stdout.splitlines() if line[:1] != "#"] == [
        line for line in before.splitlines() if line[:1] != "#"
    ]


def test_a_family_that_is_no_longer_wanted_goes() -> None:
    where = Iptables("-nft")
    where.install(PLAN, "active")
    where.replace(VARIANTS["IPv4"], "active", hold=False)
    assert where.problems(VARIANTS["IPv4"], "active") == []
    assert {count.family for count in where.counts()} == {"4"}


def test_a_rule_that_leads_to_our_chains_is_missed() -> None:
    where = Iptables("-nft")
    where.install(PLAN, "active")
    programs.run("iptables-nft -t mangle -D PREROUTING 1".split())
    assert any("IPv4 PREROUTING: the rule that leads to" in one for one in where.problems(PLAN, "active"))
