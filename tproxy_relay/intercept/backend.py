"""The two ways into the kernel, nft and iptables, with one face: install, remove, and say what is there."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tproxy_relay.errors import CapabilityMissingError, RelayError
from tproxy_relay.intercept import iptables, nft, programs
from tproxy_relay.intercept.holder import Holder
from tproxy_relay.intercept.plan import Family, Plan, State
from tproxy_relay.intercept.programs import ProgramError

_FAMILIES: tuple[Family, ...] = (4, 6)
_PROGRAMS: dict[Family, str] = {4: "iptables", 6: "ip6tables"}
_NFT_FAMILIES: dict[Family, str] = {4: "ip", 6: "ip6"}


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
    """Where rules go."""

    name: str
    holder: Holder | None = None
    """The child that owns the rules, if one does."""

    @property
    @abstractmethod
    def tells_changes(self) -> bool:
        """True if the kernel tells when somebody changes these rules (changes.py)."""

    @property
    @abstractmethod
    def refuses_without_listener(self) -> bool:
        """True if active rules with `on-failure closed` refuse what they have no listener for."""

    @abstractmethod
    def steps(self, plan: Plan, state: State) -> list[Step]:
        """What `install` does."""

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
        return list(_differences(wanted, there))

    def labels(self) -> Labels:
        """The labels of the rules that the kernel has."""
        there: Labels = {}
        for count in self.counts():
            there.setdefault(f"{count.family} {count.chain}", []).append(count.label)
        return there


class Nft(Backend):
    """One table, `inet tproxy_relay`. With `hold` a child owns it, and it goes when the child goes."""

    name = "nft"

    def __init__(self, hold: bool = False) -> None:
        self._hold = hold

    @property
    def tells_changes(self) -> bool:
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
        if self.holder is not None and self.holder.alive:
            self.change(plan, state)  # an owned table cannot be deleted and made again in one transaction
            return
        self._close_holder()
        self.holder = Holder()
        try:
            self.holder.load(nft.script(plan, state, held=True))
        except RelayError:
            self._close_holder()
            raise

    def change(self, plan: Plan, state: State) -> None:
        if self.holder is None:
            programs.run(["nft", "-f", "-"], nft.change(plan, state))
        else:
            self.holder.load(nft.change(plan, state, held=True))

    def remove(self) -> bool:
        if self.holder is not None:
            self._close_holder()
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

    def _close_holder(self) -> None:
        if self.holder is not None:
            self.holder.close()
            self.holder = None

    @staticmethod
    def _table() -> list[dict[str, Any]]:
        """The table as `nft -j` lists it; empty if it is not there. Raises if nft cannot say."""
        argv = ["nft", "-j", "list", "table", "inet", nft.TABLE]
        done = programs.run(argv, check=False)
        if done.returncode:
            if "no such file or directory" in done.stderr.lower():
                return []
            raise programs.refusal(argv, done.stderr or done.stdout)
        try:
            return list(json.loads(done.stdout)["nftables"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProgramError(f"`{' '.join(argv)}` did not answer in JSON") from error


class Iptables(Backend):
    """Chains of our own in mangle and nat; `variant` is '', '-nft' or '-legacy', as in the programs' names."""

    def __init__(self, variant: str) -> None:
        self._variant = variant
        self.name = f"iptables{variant}"

    @property
    def tells_changes(self) -> bool:
        return self._over_nft(4)

    @property
    def refuses_without_listener(self) -> bool:
        return False

    def steps(self, plan: Plan, state: State) -> list[Step]:
        return [
            Step(self._restore(family), self._text(plan, state, family, self._before(family)))
            for family in plan.families
        ]

    def _before(self, family: Family) -> iptables.Saved:
        """What there is already; for an account that may not look, nothing."""
        try:
            return self._saved(family)
        except RelayError:
            return iptables.read("")

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
        ours = {name: labels for name, labels in there.items() if f" {iptables.PREFIX}" in name}
        jumps = {name: labels for name, labels in there.items() if name not in ours}
        found = list(_differences(wanted, ours))
        for family in plan.families:
            for hook in sorted({chain.hook for chain in iptables.chains(plan, state, family) if chain.hook}):
                number = sum(chain.hook == hook for chain in iptables.chains(plan, state, family))
                marks = [label.split(" made=")[0] for label in jumps.get(f"{family} {hook}", [])]
                if marks != [f"plan {plan.digest} {state}"] * number:
                    found.append(
                        f"IPv{family} {hook}: the rule that leads to the relay's chain is not there as planned"
                    )
        return found

    def _text(self, plan: Plan, state: State, family: Family, saved: iptables.Saved) -> str:
        return iptables.restore(plan, state, family, saved, ",".join(self._to_make(plan, state, family, saved)))

    def _to_make(self, plan: Plan, state: State, family: Family, saved: iptables.Saved) -> list[str]:
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

    def _saved(self, family: Family) -> iptables.Saved:
        # Without -t, because naming a table would make the legacy kind load it.
        return iptables.read(programs.run([self._program(family, "-save"), "-c"]).stdout)

    def _restore(self, family: Family) -> tuple[str, ...]:
        return (self._program(family, "-restore"), "-w", "--noflush")

    def _program(self, family: Family, job: str = "") -> str:
        return f"{_PROGRAMS[family]}{self._variant}{job}"

    def _over_nft(self, family: Family) -> bool:
        """True where the program keeps its rules in nftables, and makes tables and chains there as it needs them."""
        return "nf_tables" in programs.run([self._program(family), "-V"], check=False).stdout


def choose(name: str, plan: Plan, *, hold: bool = False, warn: Callable[[str], None] = lambda line: None) -> Backend:
    """The backend of that name; for `auto` nft if the kernel takes the plan from it, else iptables.
    Raises ProgramError if there is none, CapabilityMissingError without the right to ask."""
    if name != "auto":
        return of_name(name, hold=hold)
    try:
        programs.run(["nft", "-c", "-f", "-"], nft.script(plan, "active"))
        return Nft(hold)
    except CapabilityMissingError:
        raise
    except RelayError as error:
        if programs.find("iptables-restore") is None:
            raise ProgramError(f"neither nft nor iptables works here: {error}") from error
        warn(f"using iptables, because nft does not work here: {error}")
        return of_name("iptables")


def of_name(name: str, *, hold: bool = False) -> Backend:
    """The backend that is called so, `auto` excepted."""
    return Nft(hold) if name == "nft" else Iptables(_variant(name.removeprefix("iptables")))


def preferred() -> Backend:
    """What `auto` would try first, without asking the kernel: for showing."""
    return of_name("iptables") if programs.find("nft") is None and programs.find("iptables-restore") else Nft()


def present() -> list[Backend]:
    """Every backend in which there is something of ours. One that cannot say is passed over (in a user namespace the
    legacy iptables cannot); if none can for want of a right, CapabilityMissingError."""
    found: list[Backend] = []
    refused: list[CapabilityMissingError] = []
    answered = False
    for backend in (Nft(), *map(Iptables, _variants())):
        try:
            if backend.counts():
                found.append(backend)
            answered = True
        except CapabilityMissingError as error:
            refused.append(error)
        except RelayError:
            continue
    if refused and not answered:
        raise refused[0]
    return found


def _variant(given: str) -> str:
    """Which of the two `iptables` itself is, if it has that one's name beside its own."""
    if given or programs.find("iptables") is None:
        return given
    said = programs.run(["iptables", "-V"], check=False).stdout
    named = "-nft" if "nf_tables" in said else "-legacy"
    return named if programs.find(f"iptables{named}-save") else ""


def _variants() -> list[str]:
    """Names of the iptables that this host has; the plain one only where the others have no names of their own."""
    named = [variant for variant in ("-nft", "-legacy") if programs.find(f"iptables{variant}-save")]
    return named or ([""] if programs.find("iptables-save") else [])


def _differences(wanted: Labels, there: Labels) -> Iterator[str]:
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


def _counter(rule: dict[str, Any]) -> tuple[int | None, int | None]:
    for expression in rule.get("expr", ()):
        counter = expression.get("counter") if isinstance(expression, dict) else None
        if isinstance(counter, dict):
            return counter["packets"], counter["bytes"]
    return None, None


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
