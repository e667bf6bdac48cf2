"""What has changed since another run: python tests/bench/compare.py BASELINE.json NEW.json

Two runs on a machine that is shared, or on two machines, cannot be compared; their ratios to the same relay can. A row
is shown where the new ratios to it lie wholly outside of the old ones and the medians differ by more than NOISE.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import figures  # noqa: E402
from targets import TARGETS  # noqa: E402

NOISE = 0.10
"""Of a ratio: two slots of one run have differed by more."""


def main(argv: Sequence[str]) -> int:
    """Returns 1 if something has become worse."""
    if len(argv) != 2:
        print((__doc__ or "").split("\n", 1)[0])
        return 2
    old, new = (json.loads(Path(name).read_text()) for name in argv)
    worse = 0
    for cell, figure, peer, least, before, after in changes(old, new):
        better = (after.median > before.median) == least
        worse += not better
        word = "better" if better else "WORSE"
        print(f"{word:6} {cell:14} {figure:12} x {peer:14} {before} -> {after}")
    print(f"{old['machine']['commit']} -> {new['machine']['commit']}: {worse} worse")
    return 1 if worse else 0


def changes(
    old: dict[str, Any], new: dict[str, Any]
) -> Iterator[tuple[str, str, str, bool, figures.Ratio, figures.Ratio]]:
    """Cell, figure, relay that it is measured by, whether more is better, the old ratio and the new one."""
    wanted = dict.fromkeys((target.cell, target.figure, target.peer, target.least) for target in TARGETS)
    for cell, figure, peer, least in wanted:
        if peer is None:
            continue
        ratios = [figures.ratio(run["rounds"].get(cell, []), figure, "relay", peer) for run in (old, new)]
        before, after = ratios
        if before is None or after is None:
            continue
        apart = after.least > before.most or after.most < before.least
        if apart and abs(after.median / before.median - 1) > NOISE:
            yield cell, figure, peer, least, before, after


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
