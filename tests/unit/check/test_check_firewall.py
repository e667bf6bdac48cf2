"""Other people's rules, as nft and iptables themselves print them, and what becomes of a packet in them.

The rules are loaded into the kernel and read back, in a network namespace of the lab.
"""

import json
import shlex
from collections.abc import Iterator

import pytest

from tproxy_relay.check import firewall, firewall_iptables, firewall_nft
from tproxy_relay.check.firewall import ACCEPT, DROP, MAYBE, Firewall, Packet
from tproxy_relay.lab import Lab

MARK, MASK = 0x01000000, 0x07000000
IN = Packet(4, 8000, MARK, MASK, None, None)


@pytest.fixture
def host(lab: Lab) -> Iterator[Lab]:
    yield lab
    lab.relay.run(["nft", "flush", "ruleset"])
    for name in ("iptables-legacy", "ip6tables-legacy"):
        for table in ("filter", "nat", "mangle"):
            lab.relay.run([name, "-t", table, "-F"])


def nft(lab: Lab, *rules: str, policy: str = "accept", hook: str = "filter hook input priority 0") -> Firewall:
    """The firewall with one chain, and another one called `other`."""
    text = "table inet f {\n chain other {\n tcp dport 8000 accept\n }\n"
    text += f" chain c {{\n type {hook}; policy {policy};\n " + "\n ".join(rules) + "\n }\n}\n"
    lab.relay.run(["nft", "-f", "-"], input=text)
    return firewall_nft.chains(_json(lab), [])


def _json(lab: Lab):  # type: ignore[no-untyped-def]
    return json.loads(lab.relay.run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]


def judged(rules: Firewall, packet: Packet = IN) -> str:
    (found,) = firewall.base_chains(rules, "input", "filter", packet.family)
    return firewall.verdict(*found, packet)[0]


NFT = [
    ((), "accept", ACCEPT),
    ((), "drop", DROP),
    (("tcp dport 8000 accept",), "drop", ACCEPT),
    (("tcp dport 7999-8001 accept",), "drop", ACCEPT),
    (("tcp dport { 22, 8000-8010 } accept",), "drop", ACCEPT),
    (("tcp dport != 8000 accept",), "drop", DROP),
    (("tcp dport 22 accept", "udp dport 8000 accept", "icmp type echo-request accept"), "drop", DROP),
    (("meta l4proto { icmp, ipv6-icmp } accept",), "drop", DROP),
    (("meta nfproto ipv6 accept",), "drop", DROP),
    (('iifname "lo" accept',), "drop", DROP),
    (('iifname "eth0" accept',), "drop", MAYBE),
    (('iifname "eth*" accept',), "drop", MAYBE),
    (("ip saddr 10.0.0.0/8 accept",), "drop", MAYBE),
    (("ip saddr 10.0.0.0/8 drop",), "accept", ACCEPT),
    (("ct state established,related accept",), "drop", DROP),
    (("ct state new accept",), "drop", ACCEPT),
    (("ct state invalid drop",), "accept", ACCEPT),
    (("ct state vmap { established : accept, related : accept, invalid : drop }",), "drop", DROP),
    (("tcp dport vmap { 22 : accept, 8000 : jump other }",), "drop", ACCEPT),
    (("ct status dnat accept",), "drop", DROP),
    (("meta mark & 0x07000000 == 0x01000000 accept",), "drop", ACCEPT),
    (("meta mark & 0x07000000 != 0 accept",), "drop", ACCEPT),
    (("meta mark & 0x07000000 == 0x02000000 accept",), "drop", DROP),
    (("meta mark & 0x07000001 == 0x01000001 accept",), "drop", MAYBE),
    (("meta mark 0x1 accept",), "drop", DROP),
    (("jump other",), "drop", ACCEPT),
    (("goto other",), "drop", ACCEPT),
    (('iifname "eth0" goto other',), "drop", MAYBE),
    (("tcp dport 22 jump other",), "drop", DROP),
    (("return",), "drop", DROP),
    (("counter", "log prefix \"x\"", "reject"), "accept", DROP),
    (("limit rate 5/second accept",), "drop", MAYBE),
    (("limit rate over 5/second drop",), "accept", ACCEPT),
    (("tcp dport 8000 reject with tcp reset",), "accept", DROP),
]  # fmt: skip


@pytest.mark.parametrize("rules, policy, expected", NFT, ids=lambda value: "; ".join(value) if value != "" else "-")
def test_nft(host: Lab, rules: tuple[str, ...], policy: str, expected: str) -> None:
    assert judged(nft(host, *rules, policy=policy)) == expected


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize(
    "rules, expected",
    [
        (("-P INPUT DROP",), DROP),
        (("-P INPUT DROP", "-A INPUT -p tcp --dport 8000 -j ACCEPT"), ACCEPT),
        (("-A INPUT -p tcp -m multiport --dports 22,7000:8000 -j DROP",), DROP),
        (("-A INPUT -p udp --dport 8000 -j DROP",), ACCEPT),
        (("-P INPUT DROP", "-A INPUT -i lo -j ACCEPT"), DROP),
        (("-A INPUT ! -i lo -j REJECT",), DROP),
        (("-P INPUT DROP", "-A INPUT -i eth0 -j ACCEPT"), MAYBE),
        (("-P INPUT DROP", "-A INPUT -s 10.0.0.0/8 -j ACCEPT"), MAYBE),
        (("-P INPUT DROP", "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"), DROP),
        (("-P INPUT DROP", "-A INPUT -m conntrack --ctstate NEW -j ACCEPT"), ACCEPT),
        (("-P INPUT DROP", "-A INPUT -m mark ! --mark 0x0/0x07000000 -j ACCEPT"), ACCEPT),
        (("-P INPUT DROP", "-A INPUT -m connmark --mark 0x1000000/0x07000000 -j ACCEPT"), MAYBE),
        (("-N X", "-A X -p tcp --dport 22 -j RETURN", "-A X -j DROP", "-A INPUT -j X"), DROP),
        (("-N X", "-A X -p tcp --dport 8000 -j RETURN", "-A X -j DROP", "-A INPUT -j X"), ACCEPT),
        (('-A INPUT -m comment --comment "-j DROP it, not" -p tcp -j ACCEPT', "-A INPUT -j DROP"), ACCEPT),
        (("-A INPUT -j LOG --log-prefix drop", "-A INPUT -m owner --uid-owner 0 -j DROP"), ACCEPT),
    ],
    ids=lambda value: "; ".join(value) if isinstance(value, tuple) else value,
)
def test_iptables(fresh_lab: Lab, program: str, rules: tuple[str, ...], expected: str) -> None:
    for rule in rules:
        if "owner" in rule:
            continue  # is refused in INPUT by the kernel
        fresh_lab.relay.run([program, *shlex.split(rule)])
    # By name: only the real root may read which tables there are.
    saved = fresh_lab.relay.run([f"{program}-save", "-t", "filter"]).stdout
    assert judged(firewall_iptables.chains(program, saved)) == expected


def test_marks_are_seen_wherever_they_stand(host: Lab) -> None:
    rules = nft(
        host,
        "meta mark set 0x10",
        "meta mark set meta mark & 0xfffffeff | 0x00000100",
        "ct mark 0x2000 accept",
        "meta mark & 0xff0000 == 0x80000 drop",
    )
    marks = [mark for _, rule in firewall.all_rules(rules) for mark in rule.marks]
    assert marks == [(0x10, 0xFFFFFFFF), (0x100, 0x100), (0x2000, 0xFFFFFFFF), (0x80000, 0xFF0000)]


def test_the_commands_for_a_rule_work_as_printed(host: Lab) -> None:
    rules = nft(host, "tcp dport 22 accept", policy="drop")
    ((_, rule),) = [pair for pair in firewall.all_rules(rules) if pair[0].name == "c"]
    chain = rules["nft inet f"]["c"]
    host.relay.run(["sh", "-c", rule.delete])
    host.relay.run(["sh", "-c", chain.insert.format(mask=MASK)])
    assert judged(firewall_nft.chains(_json(host), [])) == ACCEPT


def test_tables_of_iptables_are_left_to_it(host: Lab) -> None:
    host.relay.run(["iptables-nft", "-A", "INPUT", "-j", "DROP"])
    assert firewall_nft.chains(_json(host), [("ip", "filter")]) == {}


@pytest.mark.parametrize(
    "rule, certain", [("masquerade", True), ('oifname "wan" masquerade', False), ("tcp dport 80 masquerade", None)]
)
def test_masquerading(host: Lab, rule: str, certain: bool | None) -> None:
    rules = nft(host, "meta mark & 0x07000000 == 0x02000000 accept", rule, hook="nat hook postrouting priority 100")
    found = [sure for _, sure in firewall.rewrites_source(rules, IN)]
    assert found == ([] if certain is None else [certain])
    assert list(firewall.rewrites_source(rules, IN._replace(mark=0x02000000))) == []
