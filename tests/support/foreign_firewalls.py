"""Other people's rules, loaded into the kernel of a lab's relay host and read back as nft prints them."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from tproxy_relay.check import firewall, firewall_nft
from tproxy_relay.check.firewall import Firewall, Packet
from tproxy_relay.lab import Lab

MARK, MASK = 0x01000000, 0x07000000
IN = Packet(4, 8000, MARK, MASK, None, None)


@contextlib.contextmanager
def cleared(lab: Lab) -> Iterator[Lab]:
    """The lab, whose relay host has no rules afterwards."""
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
    return firewall_nft.chains(objects(lab), [])


def objects(lab: Lab) -> Any:
    """What `nft -j list ruleset` has there."""
    return json.loads(lab.relay.run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]


def judged(rules: Firewall, packet: Packet = IN) -> str:
    """What becomes of the packet in the one chain at the hook input."""
    (found,) = firewall.base_chains(rules, "input", "filter", packet.family)
    return firewall.verdict(*found, packet)[0]
