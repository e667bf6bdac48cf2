"""What happens to connections in the field, directly and through the relay: hosts that change, packets that are no TCP
segments, rules of others.

    python tests/faults/field.py [--keep] [PART OF A NAME ...]

Prints the table: every case by IPv4 and by IPv6, directly and with each kind of rules. --keep writes docs/field.csv,
which the manual shows. Each case is played in a lab of its own. What does not get through has ten seconds for the
relay to mend it; then the remedies that `status` prints are run, as they are printed. The exit code is 1 if a case is
not as it is directly, and nobody has said why.
"""

import contextlib
import csv
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import flush_trials
from doctors import Doctor, program_in
from field_cases import CASES, Case
from health_views import SOON, Document, is_ok, status
from interception import BACKENDS, FAMILIES
from transfer_trials import Transfer

from tproxy_relay.lab import Lab, LabError, RelayProcess

KEPT = Path(__file__).parents[2] / "docs" / "field.csv"
HEAD = ("what happens", "by", "direct", *BACKENDS, "why it differs")
SELF_PROBE = ("--self-probe", "600")
"""As it is by default, but not for relays in a lab."""
RECORD_TIMEOUT = 2.0
TURNS = 4
"""A rule for each family has a remedy for each."""
SERVED = ("complete", flush_trials.LIVES)
"""What clients see that are served."""
NOT_HERE = "-"
"""In the column of rules with which the case cannot be."""


class Played:
    """A case with a relay, in a lab, prepared."""

    def __init__(self, case: Case, lab: Lab, relay: RelayProcess, folder: Path) -> None:
        self._case, self._lab, self._relay = case, lab, relay
        self._doctor = Doctor(lab.relay, folder)

    def seen(self, family: str, direct: str) -> str:
        """What a client sees: at once, or when the relay has mended it, or when the remedies have been run."""
        saw = self._attempt(family)
        if saw in (direct, self._case.relayed):
            return saw
        if self._settled(family, direct) == direct:
            return direct
        named = []
        for _ in range(TURNS):
            ill = self._ill()
            if is_ok(ill):
                break
            for one in ill["problems"]:
                named.append(one["name"])
                with contextlib.suppress(LabError):
                    self._doctor.shell(one["remedy"])
            saw = self._settled(family, direct)
        words = ", ".join(dict.fromkeys(named))
        return f"{saw} after the remedy ({words})" if words else saw

    def _ill(self) -> Document:
        """What `status` says, as soon as it says that something is wrong, or after a while: what numbers tell takes ten
        lost clients."""
        until = time.monotonic() + 3 * SOON
        while is_ok(said := status(self._lab)) and time.monotonic() < until:
            pass
        return said

    def _settled(self, family: str, direct: str) -> str:
        """What a client sees in the end."""
        until = time.monotonic() + SOON
        while (saw := self._attempt(family)) != direct and time.monotonic() < until:
            pass
        return saw

    def _attempt(self, family: str) -> str:
        """What a client sees, and whether it is the relay that it sees it through."""
        one = self._case.trial(self._lab, FAMILIES[family])
        if one.saw in SERVED:
            try:
                self._relay.wait_for_record(lambda line: line["client"] == one.client, RECORD_TIMEOUT)
            except LabError:
                return f"{one.saw}, past the relay"
        return phrase(one)


def table(cases: Sequence[Case], folder: Path) -> Iterator[list[str]]:
    """The rows, one for each case and family."""
    for case in cases:
        direct = played_directly(case)
        by_backend = {one: played(case, one, direct, folder) for one in case.backends}
        for family in case.families:
            cells = [by_backend[one][family] if one in by_backend else NOT_HERE for one in BACKENDS]
            row = [case.name, f"IP{family}", direct[family], *cells, ""]
            known = all(cell in (direct[family], case.relayed, NOT_HERE) for cell in cells)
            yield [*row[:-1], case.reason] if differs(row) and known else row


def played_directly(case: Case) -> dict[str, str]:
    """What a client sees by each family, without a relay."""
    with Lab() as lab, case.before(lab), case.after(lab):
        return {family: phrase(case.trial(lab, FAMILIES[family])) for family in case.families}


def played(case: Case, backend: str, direct: dict[str, str], folder: Path) -> dict[str, str]:
    """The same with a relay."""
    with Lab() as lab, case.before(lab), lab.relay_process(*case.options, "--backend", backend, *SELF_PROBE) as relay:
        with case.after(lab):
            one = Played(case, lab, relay, folder)
            return {family: one.seen(family, direct[family]) for family in case.families}


def differs(row: list[str]) -> bool:
    """True if a client sees something else than directly, and no remedy helps."""
    return any(cell != NOT_HERE and cell.partition(" after the remedy")[0] != row[2] for cell in row[3:-1])


def phrase(one: Transfer) -> str:
    """To be read."""
    return one.saw.replace("TimeoutError", "no answer").replace("ConnectionResetError", "reset")


def main(arguments: list[str]) -> int:
    """Play, print, keep."""
    wanted = [one for one in arguments if one != "--keep"]
    cases = [case for case in CASES if not wanted or any(word in case.name for word in wanted)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in table(cases, program_in(Path(folder))):
            print(" | ".join(row), flush=True)
            rows.append(row)
    unexplained = [row[0] for row in rows if differs(row) and not row[-1]]
    print(f"{len(rows)} rows; not as directly, and nobody says why: {', '.join(unexplained) or 'none'}")
    if "--keep" in arguments and not wanted:
        with KEPT.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([list(HEAD), *rows])
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
