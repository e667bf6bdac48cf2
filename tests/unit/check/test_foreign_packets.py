"""What others do to packets of relayed connections, in a network of the test's own. That it harms real connections, and
that the remedies mend them, is shown in tests/e2e/test_check_neighbours.py.
"""

import shlex

import pytest
from doctor import PORT, case, levels
from neighbour_trials import chain

from tproxy_relay.check import foreign_packets
from tproxy_relay.check.finding import Finding
from tproxy_relay.intercept import programs
from tproxy_relay.settings import PortRange

pytestmark = pytest.mark.usefixtures("network")

BOTH = {"intercept_outbound": (PortRange(9000, 9000),)}
LATER = "filter hook prerouting priority mangle + 10"


def shell(line: str) -> None:
    programs.run(["sh", "-c", line])


def test_a_filter_that_drops_what_is_relayed_lets_it_in_by_its_mark() -> None:
    assert levels([*foreign_packets.probe_filters(case())]) == [("filter", "ok")]
    chain = "chain c { type filter hook input priority 0; policy drop; tcp dport 22 accept; }"
    programs.run(["nft", "-f", "-"], f"table inet somebodys {{ {chain}; }}")
    (found,) = foreign_packets.probe_filters(case())
    assert found.level == "problem" and "policy drop of nft chain inet somebodys c" in found.what
    programs.run(shlex.split(found.remedy))
    assert levels([*foreign_packets.probe_filters(case())]) == [("filter", "ok")]


@pytest.mark.parametrize("condition, level", [("", "problem"), ('iifname "wan" ', "warning")])
@pytest.mark.parametrize("program", ["nft", "iptables-nft"])
def test_synproxy_answers_in_the_place_of_the_relay(program: str, condition: str, level: str) -> None:
    assert not [*foreign_packets.probe_synproxy(case())]
    for port in (22, PORT.first):
        if program == "nft":
            rule = f"{condition}tcp dport {port} ct state invalid,untracked synproxy mss 1460 wscale 7"
            shell(f"nft 'table inet p{port} {{ chain c {{ type filter hook input priority 0; {rule}; }}; }}'")
        else:
            rule = f"{condition.replace('iifname', '-i')}-p tcp --dport {port} -m conntrack --ctstate INVALID,UNTRACKED"
            shell(f"iptables-nft -A INPUT {rule} -j SYNPROXY --mss 1460")
    (found,) = foreign_packets.probe_synproxy(case())
    assert (found.name, found.level) == ("synproxy", level) and "8000" in found.what
    shell(found.remedy)
    assert not [*foreign_packets.probe_synproxy(case())]


@pytest.mark.parametrize(
    "hook, rule, level",
    [
        (LATER, "meta mark set ct mark", "problem"),
        (LATER, "meta mark set ct mark & 0xff | 0x100", "problem"),
        (LATER, "meta mark set numgen inc mod 2", "problem"),
        (LATER, "meta mark set symhash mod 2", "problem"),
        (LATER, "meta mark set 1", "problem"),
        (LATER, "tcp dport 8000 meta mark set 1", "problem"),
        (LATER, 'iifname != "lo" meta mark set 1', "problem"),
        (LATER, "meta mark set meta mark & 0xff000000 | 1", ""),
        (LATER, "meta mark set meta mark | 1", ""),
        (LATER, "meta mark set meta mark ^ 1", ""),
        (LATER, "meta mark set meta mark | 0x02000000", ""),  # is found as a clash of bits
        (LATER, "tcp dport 22 meta mark set 1", ""),
        (LATER, "meta l4proto udp meta mark set ct mark", ""),
        (LATER, "meta mark 0 meta mark set ct mark", ""),
        (LATER, "ip saddr 192.0.2.7 meta mark set 1", ""),
        (LATER, "ip saddr 192.0.2.7 return; meta mark set 1", ""),
        (LATER, "ct mark 0x539 meta mark set ct mark", ""),
        (LATER, "ct state established meta mark set ct mark", ""),
        (LATER, "ct state established meta mark set 1", "problem"),
        (LATER, "meta mark set ip saddr map { 192.0.2.7 : 1 }", ""),
        ("filter hook prerouting priority mangle - 10", "meta mark set 1", "problem"),
        ("filter hook forward priority mangle", "meta mark set 1", ""),
        ("filter hook input priority mangle", "meta mark set 1", ""),
        ("route hook output priority mangle - 10", "tcp dport 8000 meta mark set 1", ""),
        ("route hook output priority mangle + 10", "meta mark set 1", "problem"),
        ("filter hook postrouting priority mangle", "meta mark set 1", ""),
        ("filter hook postrouting priority mangle", "ct mark set meta mark", "problem"),
        ("filter hook postrouting priority mangle", 'oifname "eth0" ct mark set meta mark', ""),
        ("filter hook input priority mangle", "ct mark set 1", "problem"),
        ("filter hook input priority mangle", "ct mark set ct mark | 1", ""),
        ("filter hook prerouting priority mangle", "meta mark set ct mark", "problem"),
        ("filter hook prerouting priority mangle", "tcp dport 8000 meta mark set 1", "warning"),
    ],
)
def test_marks_that_a_rule_loses_for_certain(hook: str, rule: str, level: str) -> None:
    shell(chain(hook, rule))
    found = [one for one in foreign_packets.probe_lost_marks(case(**BOTH)) if one.level != "ok"]
    assert {one.level for one in found} == ({level} if level else set())
    mended(found)


def mended(found: list[Finding]) -> None:
    """Each remedy mends its own, and the rule is there as it was, but for the relay's packets."""
    for one in found:
        assert "neighbour" in one.what and one.why
        shell(one.remedy)
    assert levels([*foreign_packets.probe_lost_marks(case(**BOTH))]) == [("lost-marks", "ok")]
    assert "mark set" in programs.run(["nft", "list", "table", "inet", "neighbour"]).stdout


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize(
    "rule, harmful",
    [
        ("PREROUTING -j CONNMARK --restore-mark", True),
        ("PREROUTING -j CONNMARK --restore-mark --nfmask 0xff --ctmask 0xff", False),
        ("PREROUTING -m connmark ! --mark 0 -j CONNMARK --restore-mark", True),
        ("PREROUTING -m connmark --mark 0x539 -j CONNMARK --restore-mark", False),
        ("OUTPUT -j MARK --set-mark 1", True),
        ("OUTPUT -j MARK --set-xmark 0x1/0xff", False),
        ("OUTPUT -p udp -j MARK --set-mark 1", False),
        ("POSTROUTING -j CONNMARK --save-mark", True),
        ("POSTROUTING -j CONNMARK --save-mark --nfmask 0xff --ctmask 0xff", False),
        ("PREROUTING -j HMARK --hmark-tuple src --hmark-mod 10 --hmark-offset 100 --hmark-rnd 1", True),
    ],
)
def test_marks_that_iptables_loses(program: str, rule: str, harmful: bool) -> None:
    shell(f"{program} -t mangle -A {rule}")
    found = [one for one in foreign_packets.probe_lost_marks(case(**BOTH)) if one.level != "ok"]
    assert bool(found) is harmful
    for one in found:
        shell(one.remedy)
    assert levels([*foreign_packets.probe_lost_marks(case(**BOTH))]) == [("lost-marks", "ok")]
    assert f"-A {rule.split()[0]}" in programs.run([program, "-t", "mangle", "-S"]).stdout


@pytest.mark.parametrize(
    "make",
    [
        chain("filter hook output priority raw", "tcp dport 9000 notrack"),
        chain("filter hook output priority raw", "tcp sport 9000 notrack"),
        chain("filter hook output priority raw", "notrack"),
        "iptables-nft -t raw -A OUTPUT -p tcp --dport 9000 -j CT --notrack",
        "ip6tables-legacy -t raw -A OUTPUT -p tcp --sport 9000 -j NOTRACK",
    ],
)
def test_connections_that_are_not_tracked(make: str) -> None:
    shell(make)
    found = [one for one in foreign_packets.probe_tracking(case(**BOTH)) if one.level != "ok"]
    assert "problem" in {one.level for one in found}
    for one in found:
        shell(one.remedy)
    assert levels([*foreign_packets.probe_tracking(case(**BOTH))]) == [("tracking", "ok")]
    assert not [one for one in foreign_packets.probe_tracking(case()) if one.level == "problem"], "inbound does without"


@pytest.mark.parametrize(
    "make",
    [
        chain("filter hook prerouting priority raw", "tcp dport 8000 notrack"),
        chain("filter hook output priority raw", "tcp sport { 80, 8000 } notrack"),
        "iptables-legacy -t raw -A PREROUTING -p tcp -m multiport --dports 80,8000 -j NOTRACK",
    ],
)
def test_untracked_inbound_connections_are_known_but_for_floods(make: str) -> None:
    shell(make)
    found = [one for one in foreign_packets.probe_tracking(case()) if one.level != "ok"]
    assert {one.level for one in found} == {"warning"}
    for one in found:
        shell(one.remedy)
    assert levels([*foreign_packets.probe_tracking(case())]) == [("tracking", "ok")]


@pytest.mark.parametrize(
    "make",
    [
        chain("filter hook prerouting priority raw", "tcp dport 9000 notrack"),
        chain("filter hook output priority raw", "tcp dport 53 notrack", "udp dport 9000 notrack"),
        chain("filter hook output priority raw", "meta mark & 0x04000000 == 0x04000000 tcp dport 9000 notrack"),
    ],
)
def test_others_may_be_untracked(make: str) -> None:
    shell(make)
    assert levels([*foreign_packets.probe_tracking(case(**BOTH))]) == [("tracking", "ok")]


def test_another_proxy_of_programs_here_goes_behind_the_relay() -> None:
    shell(chain("nat hook output priority -100", "tcp dport 9000 redirect to :1"))
    found = [*foreign_packets.probe_redirects(case(**BOTH))]
    assert levels(found) == [("other-proxy", "problem")]
    shell(found[0].remedy)
    assert not [*foreign_packets.probe_redirects(case(**BOTH))]


def test_another_proxy_of_what_the_relay_sends() -> None:
    shell(chain("nat hook output priority -100", "tcp dport 8000 redirect to :1"))
    (found,) = foreign_packets.probe_redirects(case(mode="redirect"))
    assert "the relay's own connections" in found.what
    shell(found.remedy)
    assert not [*foreign_packets.probe_redirects(case(mode="redirect"))]


@pytest.mark.parametrize(
    "rule",
    [
        "tcp dport 22 redirect to :1",
        "meta skuid 5 tcp dport 8000 redirect to :1",
        "fib daddr type local tcp dport 8000 redirect to :1",
    ],
)
def test_redirects_of_others_are_left_alone(rule: str) -> None:
    shell(chain("nat hook output priority -100", rule))
    assert not [*foreign_packets.probe_redirects(case(**BOTH))]
