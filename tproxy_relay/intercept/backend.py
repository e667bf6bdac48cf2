"""The face that nft and iptables share: install, remove, and say what is there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tproxy_relay.intercept.nft_owner import NftOwner
from tproxy_relay.intercept.plan import Family, Plan, State


class Step(NamedTuple):
    """A program to run and what it reads."""

    argv: tuple[str, ...]
    stdin: str


class Count(NamedTuple):
    """A rule of ours in the kernel. Packets and bytes are None where it does not count."""

    family: str
    chain: str
    label: str
    packets: int | None
    bytes: int | None


Labels = dict[str, list[str]]
"""By `FAMILY CHAIN`, the labels of the rules there, in order."""


class Backend(ABC):
    """A way to have rules in the kernel, see them there, and take them away again."""

    name: str
    owner: NftOwner | None = None
    """The child that owns the rules, if one does."""

    @property
    @abstractmethod
    def reports_changes(self) -> bool:
        """True if the kernel reports changes that somebody makes to these rules (guard/netlink.py)."""

    @property
    @abstractmethod
    def refuses_without_listener(self) -> bool:
        """True if active rules with `on-failure closed` refuse what they have no listener for."""

    def can_do(self, family: Family) -> bool:
        """False if there can be no rules for that family here. Raises CapabilityMissingError without the right to
        ask."""
        return True

    @abstractmethod
    def steps(self, plan: Plan, state: State) -> list[Step]:
        """The programs that `install` runs, in order, with what they read."""

    @abstractmethod
    def install(self, plan: Plan, state: State) -> None:
        """Put the rules in the place of what there is of ours. Raises ProgramError or CapabilityMissingError; some
        of it may be there by then."""

    @abstractmethod
    def remember(self) -> Callable[[], None]:
        """What to call to have it again as it is now."""

    @abstractmethod
    def change(self, plan: Plan, state: State) -> None:
        """Bring installed rules into another state, without a moment in which relayed connections are not known."""

    @abstractmethod
    def replace(self, plan: Plan, state: State, *, hold: bool) -> None:
        """Put other rules in the place of installed ones, without such a moment either. With `hold` they are to go
        with this process from now on, if that can be. Raises like `install`."""

    @abstractmethod
    def remove(self) -> bool:
        """Take everything of ours away; True if there was anything."""

    @abstractmethod
    def counts(self) -> list[Count]:
        """The rules of ours that the kernel has, in its order."""

    @abstractmethod
    def expected(self, plan: Plan, state: State) -> Labels:
        """The labels that the rules of that plan have."""

    def problems(self, plan: Plan, state: State) -> list[str]:
        """What the kernel has otherwise than the plan says, a sentence each."""
        wanted, there = self.expected(plan, state), self.labels()
        return list(differences(wanted, there))

    def labels(self) -> Labels:
        """The labels of the rules that the kernel has."""
        there: Labels = {}
        for count in self.counts():
            there.setdefault(f"{count.family} {count.chain}", []).append(count.label)
        return there


def differences(wanted: Labels, there: Labels) -> Iterator[str]:
    """What is there otherwise than wanted, a sentence for each chain."""
    for chain in [*wanted, *(chain for chain in there if chain not in wanted)]:
        if chain not in there:
            yield f"{chain}: missing"
        elif chain not in wanted:
            yield f"{chain}: not in the plan"
        elif wanted[chain] != there[chain]:
            yield f"{chain}: {_first_difference(wanted[chain], there[chain])}"


def _first_difference(wanted: list[str], there: list[str]) -> str:
    for want, have in zip(wanted, there):
        if want != have:
            return f"'{have or 'a rule without a name'}' stands where '{want}' should"
    if len(there) < len(wanted):
        return f"'{wanted[len(there)]}' is missing"
    return f"'{there[len(wanted)] or 'a rule without a name'}' is not in the plan"
