"""What several rules of nft have in common: matches and marks, in the words of nft(8)."""

from collections.abc import Sequence
from typing import NamedTuple

from tproxy_relay.intercept.plan import Plan
from tproxy_relay.settings import PortRange

SYN = "tcp flags & (fin | syn | rst | ack) == syn"
NOT_SYN = "tcp flags & (fin | syn | rst | ack) != syn"


class Rule(NamedTuple):
    """A statement and the comment that it carries."""

    text: str
    label: str


def set_mark(plan: Plan, what: str, bits: int) -> str:
    """Our bits of `meta mark` or `ct mark` become these; the others stay."""
    others = f"{what} set {what} & {0xFFFFFFFF & ~plan.mark_mask:#010x}"
    return f"{others} | {bits:#010x}" if bits else others


def is_marked(plan: Plan, what: str, bits: int) -> str:
    """True for the rule if our bits of `meta mark` or `ct mark` are these."""
    return f"{what} & {plan.mark_mask:#010x} == {bits:#010x}"


def ports(ranges: Sequence[PortRange]) -> str:
    """A set of them."""
    return "{ " + ", ".join(map(str, ranges)) + " }"
