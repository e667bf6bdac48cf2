"""Rules by iptables and ip6tables, of either kind: chains of our own in the usual tables."""

import json
from collections.abc import Callable

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import iptables, iptables_save, programs
from tproxy_relay.intercept.backend import Backend, Count, Labels, Step, differences
from tproxy_relay.intercept.plan import Family, Plan, State

_FAMILIES: tuple[Family, ...] = (4, 6)
_PROGRAMS: dict[Family, str] = {4: "iptables", 6: "ip6tables"}
_NFT_FAMILIES: dict[Family, str] = {4: "ip", 6: "ip6"}


class Iptables(Backend):
    """Chains of our own in mangle and nat; `variant` is '', '-nft' or '-legacy', as in the programs' names."""

    def __init__(self, variant: str) -> None:
        self._variant = variant
        self.name = f"iptables{variant}"

    @property
    def reports_changes(self) -> bool:
        return self._over_nft(4)

    @property
    def refuses_without_listener(self) -> bool:
        return False

    def can_do(self, family: Family) -> bool:
        if not self._has(family):
            return False
        try:
            # The table, because without naming one the legacy kind lists none that is not loaded.
            programs.run([self._program(family, "-save"), "-t", "mangle"])
        except programs.ProgramError:
            return False
        return True

    def steps(self, plan: Plan, state: State) -> list[Step]:
        return [
            Step(self._restore(family), self._text(plan, state, family, self._before(family)))
            for family in plan.families
        ]

    def _before(self, family: Family) -> iptables_save.Saved:
        """What there is already; for an account that may not look, nothing."""
        try:
            return self._saved(family)
        except RelayError:
            return iptables_save.read("")

    def install(self, plan: Plan, state: State) -> None:
        for family in plan.families:
            programs.require(self._program(family, "-restore"))
        for family in plan.families:
            programs.run(self._restore(family), self._text(plan, state, family, self._saved(family)))

    def remember(self) -> Callable[[], None]:
        before = {family: self._saved(family) for family in _FAMILIES if self._has(family)}

        def put_back() -> None:
            for family, saved in before.items():
                if saved.chains:
                    programs.run(self._restore(family), iptables.again(saved, self._saved(family)))
                else:
                    self._remove(family)

        return put_back

    def change(self, plan: Plan, state: State) -> None:
        self.install(plan, state)  # iptables-restore is one transaction for each table, and keeps connections

    def replace(self, plan: Plan, state: State, *, hold: bool) -> None:
        self.install(plan, state)
        for family in _FAMILIES:
            if family not in plan.families and self._has(family):
                self._remove(family)

    def remove(self) -> bool:
        return any([self._remove(family) for family in _FAMILIES if self._has(family)])

    def counts(self) -> list[Count]:
        counted = []
        for family in filter(self._has, _FAMILIES):
            for rule in self._saved(family).rules:
                counted.append(Count(str(family), rule.chain, rule.label, rule.packets, rule.bytes))
        return counted

    def expected(self, plan: Plan, state: State) -> Labels:
        return {
            f"{family} {chain}": labels
            for family in plan.families
            for chain, labels in iptables.expected(plan, state, family).items()
        }

    def problems(self, plan: Plan, state: State) -> list[str]:
        wanted, there = self.expected(plan, state), self.labels()
        ours = {name: labels for name, labels in there.items() if f" {iptables_save.PREFIX}" in name}
        jumps = {name: labels for name, labels in there.items() if name not in ours}
        found = list(differences(wanted, ours))
        for family in plan.families:
            for hook in sorted({chain.hook for chain in iptables.chains(plan, state, family) if chain.hook}):
                number = sum(chain.hook == hook for chain in iptables.chains(plan, state, family))
                marks = [label.split(" made=")[0] for label in jumps.get(f"{family} {hook}", [])]
                if marks != [f"plan {plan.digest} {state}"] * number:
                    found.append(
                        f"IPv{family} {hook}: the rule that leads to the relay's chain is not there as planned"
                    )
        return found

    def _text(self, plan: Plan, state: State, family: Family, saved: iptables_save.Saved) -> str:
        return iptables.restore(plan, state, family, saved, ",".join(self._to_make(plan, state, family, saved)))

    def _to_make(self, plan: Plan, state: State, family: Family, saved: iptables_save.Saved) -> list[str]:
        """The built-in chains that come into being with ours, and those that did before. The legacy kind has them all
        in a table from the first look at it, for ever."""
        if not self._over_nft(family):
            return []
        hooks = [f"{chain.table}/{chain.hook}" for chain in iptables.chains(plan, state, family) if chain.hook]
        there = _nft_chains(family)
        return list(dict.fromkeys([*saved.made, *(hook for hook in hooks if hook not in there)]))

    def _remove(self, family: Family) -> bool:
        saved = self._saved(family)
        text = iptables.removal(saved)
        if not text:
            return False
        programs.run(self._restore(family), text)
        for name in saved.made:
            if name not in saved.rest:
                table, chain = name.split("/")
                programs.run([self._program(family), "-w", "-t", table, "-X", chain], check=False)
                _delete_if_empty(family, table)
        return True

    def _has(self, family: Family) -> bool:
        return programs.find(self._program(family, "-save")) is not None

    def _saved(self, family: Family) -> iptables_save.Saved:
        # Without -t, because naming a table would make the legacy kind load it.
        return iptables_save.read(programs.run([self._program(family, "-save"), "-c"]).stdout)

    def _restore(self, family: Family) -> tuple[str, ...]:
        return (self._program(family, "-restore"), "-w", "--noflush")

    def _program(self, family: Family, job: str = "") -> str:
        return f"{_PROGRAMS[family]}{self._variant}{job}"

    def _over_nft(self, family: Family) -> bool:
        """True where the program keeps its rules in nftables, and makes tables and chains there as it needs them."""
        return "nf_tables" in programs.run([self._program(family), "-V"], check=False).stdout


def _nft_chains(family: Family) -> frozenset[str]:
    """`TABLE/CHAIN` of what iptables-nft works on. It makes built-in chains when it needs them, but lists all of a
    table's, those too that do not exist."""
    if programs.find("nft") is None:
        return frozenset()
    done = programs.run(["nft", "-j", "list", "chains", _NFT_FAMILIES[family]], check=False)
    try:
        entries = [entry["chain"] for entry in json.loads(done.stdout)["nftables"] if "chain" in entry]
    except (ValueError, KeyError):
        return frozenset()
    return frozenset(f"{chain['table']}/{chain['name']}" for chain in entries)


def _delete_if_empty(family: Family, table: str) -> None:
    """iptables-nft deletes chains that it made, but not the table."""
    name = [_NFT_FAMILIES[family], table]
    if programs.find("nft") is None:
        return
    done = programs.run(["nft", "-j", "list", "table", *name], check=False)
    if done.returncode == 0 and not any("chain" in entry for entry in json.loads(done.stdout)["nftables"]):
        programs.run(["nft", "delete", "table", *name], check=False)
