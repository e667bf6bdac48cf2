"""Other people's rules as nft prints them, and what becomes of a packet in them.

The rules are loaded into the kernel and read back, in a network namespace of the lab.
"""

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from foreign_firewalls import MASK, cleared, judged, nft, objects

from tproxy_relay.check import firewall, firewall_nft
from tproxy_relay.check.firewall import ACCEPT, DROP, MAYBE
from tproxy_relay.lab import Lab


@pytest.fixture
def host(lab: Lab) -> Iterator[Lab]:
    with cleared(lab):
        yield lab


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
    chain = rules["nft inet f"]["c"]
    host.relay.run(["sh", "-c", chain.insert(MASK)])
    assert judged(firewall_nft.chains(objects(host), [])) == ACCEPT


@pytest.mark.parametrize("name", ["a b accept; flush ruleset; #", "$(touch here)", "a`b`", "it's", 'a"b', "a\\", "{x}"])
def test_odd_names_are_names_in_the_commands(host: Lab, name: str) -> None:
    """Only by JSON can others make these. nft would read them as rules of its language."""
    ids = {"family": "inet", "table": name}
    base = {"type": "filter", "hook": "input", "prio": 0, "policy": "drop"}
    made = [{"table": {"family": "inet", "name": name}}, {"chain": {**ids, "name": name, **base}}]
    made.append({"rule": {**ids, "chain": name, "expr": [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 1}}]}})
    host.relay.run(["nft", "-j", "-f", "-"], input=json.dumps({"nftables": [{"add": one} for one in made]}))
    chain = firewall_nft.chains(objects(host), [])[f"nft inet {name}"][name]
    (rule,) = chain.rules
    for command in (rule.spare(MASK, MASK), chain.insert(MASK)):
        assert json.dumps(name) in shlex.split(command)[2]
        host.relay.run(["sh", "-c", f"cd /tmp && {command}"])
    assert not chain.let_pass("tcp dport 1") and not Path("/tmp/here").exists()
    after = firewall_nft.chains(objects(host), [])
    assert judged(after) == ACCEPT and len(after[f"nft inet {name}"][name].rules) == 2


def test_tables_of_iptables_are_left_to_it(host: Lab) -> None:
    host.relay.run(["iptables-nft", "-A", "INPUT", "-j", "DROP"])
    assert firewall_nft.chains(objects(host), [("ip", "filter")]) == {}
