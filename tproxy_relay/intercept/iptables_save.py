"""Reading what iptables-save -c says: our own chains and rules in it, and whether others are there too."""

import re
from typing import NamedTuple

PREFIX = "TPROXY_RELAY_"
"""Our chains begin with it."""
TABLES = ("raw", "mangle", "nat", "filter")

_LEADS_TO_US = re.compile(rf" -[jg] {PREFIX}")


class Counted(NamedTuple):
    """A rule of ours as the kernel has it."""

    chain: str
    label: str
    packets: int
    bytes: int
    text: str
    """The whole rule, without its counters."""


class Saved(NamedTuple):
    """What `iptables-save -c` of one family says of the rules of a relay, and what it says of others."""

    chains: tuple[tuple[str, str], ...]
    """Table and name of each chain of ours."""
    jumps: tuple[str, ...]
    """The lines in other chains that lead to ours, with the table before them."""
    rules: tuple[Counted, ...]
    """The rules in our chains, and then the jumps."""
    rest: frozenset[str]
    """`TABLE/CHAIN` of those in which there is a rule of somebody else, or another policy than ACCEPT."""

    def chains_in(self, table: str) -> list[str]:
        """The names of a relay's chains in that table, such as mangle."""
        return [name for where, name in self.chains if where == table]

    def jumps_in(self, table: str) -> list[str]:
        """The lines of that table that lead to our chains."""
        return [line.split(" ", 1)[1] for line in self.jumps if line.startswith(f"{table} ")]

    @property
    def made(self) -> list[str]:
        """The built-in chains that did not exist before ours, as our jumps remember it."""
        for line in self.jumps:
            _, found, rest = line.partition("made=")
            if found:
                return rest.split('"')[0].split(" ")[0].split(",")
        return []


def read(saved: str) -> Saved:
    """What the output of `iptables-save -c` says; an empty one says that nothing is there."""
    table, chains_here, jumps, rules, rest = "", [], [], [], set()
    jump_rules = []
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(f":{PREFIX}"):
            chains_here.append((table, line[1:].split()[0]))
        elif line.startswith(":"):
            name, policy = line[1:].split()[:2]
            if policy not in ("-", "ACCEPT"):
                rest.add(f"{table}/{name}")
        elif line.startswith("["):
            counters, rule = line[1:].split("] ", 1)
            chain = rule.split()[1]
            packets, octets = counters.split(":")
            counted = Counted(chain, _label(rule), int(packets), int(octets), rule)
            if chain.startswith(PREFIX):
                rules.append(counted)
            elif _LEADS_TO_US.search(rule):
                jumps.append(f"{table} {rule}")
                jump_rules.append(counted)
            else:
                rest.add(f"{table}/{chain}")
    return Saved(tuple(chains_here), tuple(jumps), (*rules, *jump_rules), frozenset(rest))


def _label(rule: str) -> str:
    _, found, rest = rule.partition("--comment ")
    if not found:
        return ""
    return rest[1:].split('"')[0] if rest.startswith('"') else rest.split()[0]
