"""What several rules of iptables have in common: matches and marks, in the words of iptables-extensions(8)."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tproxy_relay.intercept.plan import Plan
from tproxy_relay.settings import PortRange

TCP = "-p tcp"
SYN = "-p tcp -m tcp --syn"
NOT_SYN = "-p tcp -m tcp ! --syn"


class Rule(NamedTuple):
    """What a rule matches and does, and the comment that it carries."""

    match: str
    then: str
    label: str

    @property
    def text(self) -> str:
        """The rule in the words of iptables, as it stands after `-A CHAIN`."""
        return f'{self.match} -m comment --comment "{self.label}" {self.then}'.strip()


def by_ports(
    match: str, ranges: Sequence[PortRange], then: str, label: str, which_port: str = "--dports"
) -> Iterator[Rule]:
    """One rule for every seven ranges: multiport takes fifteen numbers (iptables-extensions(8)), a range has two."""
    for start in range(0, len(ranges), 7):
        ports = ",".join(str(one).replace("-", ":") for one in itertools.islice(ranges, start, start + 7))
        yield Rule(f"{match} -m multiport {which_port} {ports}".strip(), then, label)


def marked(plan: Plan, value: int, direction: str) -> str:
    """Of a connection with that mark, in that direction."""
    return f"-m connmark --mark {bits(plan, value)} -m conntrack --ctdir {direction}"


def bits(plan: Plan, value: int) -> str:
    """These of our bits, with the mask that is ours."""
    return f"{value:#x}/{plan.mark_mask:#x}"
