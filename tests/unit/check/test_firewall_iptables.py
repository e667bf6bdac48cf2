"""Other people's rules as iptables-save prints them, and what becomes of a packet in them.

The rules are loaded into the kernel and read back, in a network namespace of the lab.
"""

import shlex

import pytest
from foreign_firewalls import judged

from tproxy_relay.check import firewall_iptables
from tproxy_relay.check.firewall import ACCEPT, DROP, MAYBE
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
