"""What has changed since another run.

    python tests/bench/compare.py NEW.json                  # since the one that is kept here, baseline.json
    python tests/bench/compare.py --baseline OLD.json NEW.json
    python tests/bench/compare.py --keep NEW.json           # in place of baseline.json

Rates of two machines, or of two days on a shared one, cannot be compared; ratios to the same other relay can. So each
row is about a ratio (of memory: about the figure), and is shown where the new rounds lie wholly outside of the old ones
and the medians differ by more than NOISE. A change that shows against one of the others only is that other's.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import figures  # noqa: E402
import runs  # noqa: E402
from cells import CELLS  # noqa: E402
from figures import OURS, Spread  # noqa: E402

NOISE = 0.10
"""Of a ratio: two slots of one run have differed by more."""
FEW = 3
MORE_IS_BETTER = ("throughput", "beside_throughput", "rate")
PLAIN = ("rss_per_connection", "rss_ratio", "unanswered")
"""Figures that say something without another relay."""


class Change(NamedTuple):
    """A row; `peer` is None for a plain figure."""

    cell: str
    figure: str
    peer: str | None
    better: bool
    before: Spread
    after: Spread

    def __str__(self) -> str:
        against = f"x {self.peer}" if self.peer else ""
        factor = f" ({self.after.median / self.before.median:.2f})" if self.before.median else ""
        word = "better" if self.better else "WORSE"
        return f"{word:6} {self.cell:14} {self.figure:18} {against:16} {self.before} -> {self.after}{factor}"


def main() -> int:
    """Returns 1 if something has become worse."""
    parser = argparse.ArgumentParser(description="What has changed since another run, beyond the noise.")
    parser.add_argument("--baseline", default=str(runs.BASELINE), metavar="OLD.json", help="(default: the one kept)")
    parser.add_argument("--keep", action="store_true", help="keep the new one as the baseline, and compare nothing")
    parser.add_argument("new", nargs="+", metavar="NEW.json", help="several are one run of many rounds")
    args = parser.parse_args()
    new = runs.load(args.new)
    if args.keep:
        runs.store(new, runs.BASELINE)
        return 0
    old = runs.load([args.baseline])
    found = list(changes(old, new))
    print(*found, sep="\n")
    worse = sum(not change.better for change in found)
    print(f"{_name(old)} -> {_name(new)}: {len(found) - worse} better, {worse} worse")
    for run, name in ((old, args.baseline), (new, " ".join(args.new))):
        rounds = min(map(len, run["rounds"].values()), default=0)
        few = ": too few to know what is noise" if rounds < FEW else ""
        print(f"{name}: {rounds} rounds{few}; {run['noisy']} noisy measurements, {len(run['failures'])} failures")
    return 1 if worse else 0


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Beyond the noise."""
    for cell in CELLS:
        rounds = [run["rounds"].get(cell.name, []) for run in (old, new)]
        names = {name: None for one in rounds[0] for name in one if name != OURS}
        for figure in cell.shown:
            for peer in [None] if figure in PLAIN else names:
                before, after = (
                    figures.of_peer(one, OURS, figure) if peer is None else figures.ratio(one, figure, peer)
                    for one in rounds
                )
                if before is not None and after is not None and _differ(before, after):
                    better = (after.median > before.median) == (figure in MORE_IS_BETTER)
                    yield Change(cell.name, figure, peer, better, before, after)


def _differ(before: Spread, after: Spread) -> bool:
    apart = after.least > before.most or after.most < before.least
    return apart and abs(after.median - before.median) > NOISE * before.median


def _name(run: dict[str, Any]) -> str:
    return str(run["versions"].get(OURS, "?"))


if __name__ == "__main__":
    sys.exit(main())
