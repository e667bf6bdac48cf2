"""Rules by nft: one table of our own."""

from collections.abc import Callable
from typing import Any

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import nft, nft_listing, programs
from tproxy_relay.intercept.backend import Backend, Count, Labels, Step
from tproxy_relay.intercept.nft_owner import NftOwner
from tproxy_relay.intercept.plan import Plan, State


class Nft(Backend):
    """One table, `inet tproxy_relay`. With `hold` a child owns it, and it goes when the child goes."""

    name = "nft"

    def __init__(self, hold: bool = False) -> None:
        self._hold = hold

    @property
    def reports_changes(self) -> bool:
        return True

    @property
    def refuses_without_listener(self) -> bool:
        return True

    def steps(self, plan: Plan, state: State) -> list[Step]:
        return [Step(("nft", "-f", "-"), nft.script(plan, state))]

    def install(self, plan: Plan, state: State) -> None:
        if not self._hold:
            programs.run(["nft", "-f", "-"], nft.script(plan, state))
            return
        if self.owner is not None and self.owner.alive:
            self._load_again(plan, state, held=True)
            return
        self._close_owner()
        self.owner = NftOwner()
        try:
            self.owner.load(nft.script(plan, state, held=True))
        except RelayError:
            self._close_owner()
            raise

    def change(self, plan: Plan, state: State) -> None:
        if self.owner is None:
            programs.run(["nft", "-f", "-"], nft.change(plan, state))
        else:
            self.owner.load(nft.change(plan, state, held=True))

    def replace(self, plan: Plan, state: State, *, hold: bool) -> None:
        """The table is deleted and made again in one transaction, so that no chain is left of those that only the
        former plan had. Whoever makes it says whether it is held: its owner can give it up that way, and a new owner
        take it, with no moment without it."""
        if self.owner is not None and self.owner.alive and not hold:
            self._load_again(plan, state, held=False)
            self._hold = False
            self._close_owner()
            return
        former, self._hold = self._hold, hold
        try:
            self.install(plan, state)
        except RelayError:
            self._hold = former
            if former or not hold:
                raise
            self.install(plan, state)  # held by nobody: before Linux 5.12 there is no other way

    def _load_again(self, plan: Plan, state: State, *, held: bool) -> None:
        """By the owner of the table. Without the line that makes sure that there is one: for the kernel it
        is an attempt to change the owner."""
        assert self.owner is not None
        self.owner.load(nft.script(plan, state, held=held).partition("\n")[2])

    def remove(self) -> bool:
        if self.owner is not None:
            self._close_owner()
            return True
        if not self._table():
            return False
        programs.run(["nft", "-f", "-"], nft.removal())
        return True

    def remember(self) -> Callable[[], None]:
        listed = programs.run(["nft", "list", "table", "inet", nft.TABLE], check=False).stdout

        def put_back() -> None:
            self.remove()
            if listed:
                programs.run(["nft", "-f", "-"], listed)

        return put_back

    def counts(self) -> list[Count]:
        rules = (entry["rule"] for entry in self._table() if "rule" in entry)
        return [Count("inet", rule["chain"], rule.get("comment", ""), *_counter(rule)) for rule in rules]

    def expected(self, plan: Plan, state: State) -> Labels:
        return {f"inet {chain.name}": [rule.label for rule in chain.rules] for chain in nft.chains(plan, state)}

    def _close_owner(self) -> None:
        if self.owner is not None:
            self.owner.close()
            self.owner = None

    @staticmethod
    def _table() -> list[dict[str, Any]]:
        """The table as nft lists it; empty if it is not there. Raises if nft cannot say."""
        return nft_listing.table("inet", nft.TABLE)


def _counter(rule: dict[str, Any]) -> tuple[int | None, int | None]:
    for expression in rule.get("expr", ()):
        counter = expression.get("counter") if isinstance(expression, dict) else None
        if isinstance(counter, dict):
            return counter["packets"], counter["bytes"]
    return None, None
