"""Other people's rules as iptables-save prints them, and what becomes of a packet in them.

The rules are loaded into the kernel and read back, in a network namespace of the lab.
"""

import shlex
from pathlib import Path

import pytest
from foreign_firewalls import judged

from tproxy_relay.check import firewall, firewall_iptables
from tproxy_relay.check.firewall import ACCEPT, DROP, MAYBE, Chain, Rule
from tproxy_relay.lab import Lab


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
        (("-A INPUT -m comment --comment '{x} {} $(id) -g' -j DROP",), DROP),
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


HOSTILE = ["web $(touch pwned)", "`touch pwned`", "'; touch pwned; '", '"; touch pwned; "', "it's", 'a\\ \\"b']
HOSTILE += ["{x} {0} {}", "a -j ACCEPT", "x -g y -m connmark --mark 0x1/0xffffffff", "-j", "#", "*", "a & touch pwned"]


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("text", HOSTILE)
def test_what_others_write_is_a_word_of_the_command(fresh_lab: Lab, tmp_path: Path, program: str, text: str) -> None:
    """Pasted, it runs nothing of it; and the rule has the same comment afterwards."""
    fresh_lab.relay.run([program, "-A", "INPUT", "-m", "comment", "--comment", text, "-j", "MARK", "--set-mark", "1"])
    ((_, rule),) = rules_of(fresh_lab, program)
    spare, before = rule.spare(0x7000000, 0x7000000), rule.where
    assert text in shlex.split(spare)
    pasted(fresh_lab, tmp_path, spare)
    ((chain, rule),) = rules_of(fresh_lab, program)
    assert rule.where == before.replace("0x1/0xffffffff", "0x1/0xf8ffffff") or "connmark" in text
    pasted(fresh_lab, tmp_path, chain.insert(0x7000000))
    assert [one.action for _, one in rules_of(fresh_lab, program)] == ["accept", ""]


@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("name", ["$(>pwned)", "`>pwned`", ";>pwned;", "a'b", "{x}", "$X", "*"])
def test_names_of_others_are_words_of_the_command(fresh_lab: Lab, tmp_path: Path, program: str, name: str) -> None:
    fresh_lab.relay.run([program, "-N", name])
    fresh_lab.relay.run([program, "-A", name, "-i", name, "-j", "MARK", "--set-mark", "1"])
    ((chain, rule),) = rules_of(fresh_lab, program)
    for command in (rule.spare(1, 1), chain.insert(1), chain.let_pass("-p tcp --dport 1")):
        assert name in shlex.split(command)
        pasted(fresh_lab, tmp_path, command)
    assert len(rules_of(fresh_lab, program)) == 3


def rules_of(lab: Lab, program: str) -> list[tuple[Chain, Rule]]:
    saved = lab.relay.run([f"{program}-save", "-t", "filter"]).stdout
    return [*firewall.all_rules(firewall_iptables.chains(program, saved))]


def pasted(lab: Lab, folder: Path, command: str) -> None:
    lab.relay.run(["sh", "-c", f"cd {folder} && {command}"])
    assert not [*folder.iterdir()]
