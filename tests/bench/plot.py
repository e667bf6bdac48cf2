"""Pictures of a run for the manual: python tests/bench/plot.py RUN.json FOLDER

ratios.svg: what the relay reaches, as a part of each other relay. curve.svg: requests a second over the number of
connections, if the group `curve` was measured. Needs matplotlib (pip install '.[bench]').
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import figures  # noqa: E402
import matplotlib  # noqa: E402
from cells import CELLS  # noqa: E402

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tproxy-relay", "font.size": 10})

from matplotlib import pyplot  # noqa: E402

SHOWN = ("haproxy", "envoy", "go", "c", "direct")
COLOURS = {
    "relay": "#d1495b",
    "haproxy": "#00798c",
    "envoy": "#edae49",
    "go": "#66a182",
    "c": "#8d6a9f",
    "direct": "#777777",
}
"""Readable on white and on black."""
INK = "#808080"


def main(argv: Sequence[str]) -> int:
    """Returns 2 for a wrong command line."""
    if len(argv) != 2:
        print((__doc__ or "").split("\n", 1)[0])
        return 2
    run, folder = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    ratios(run, folder / "ratios.svg")
    if any(name.startswith("curve") for name in run["rounds"]):
        curve(run, folder / "curve.svg")
    return 0


def ratios(run: dict[str, Any], path: Path) -> None:
    """Rates only: more is better; one mark for each other relay, on a line for each cell."""
    cells = [cell for cell in CELLS if cell.main == "rate" and cell.name in run["rounds"] and cell.group != "curve"]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(cells)))
    for name in SHOWN:
        found = [
            (row, figures.ratio(run["rounds"][cell.name], "rate", "relay", name)) for row, cell in enumerate(cells)
        ]
        there = [(row, ratio) for row, ratio in found if ratio is not None]
        axes.errorbar(
            [ratio.median for _, ratio in there],
            [row for row, _ in there],
            xerr=[[r.median - r.least for _, r in there], [r.most - r.median for _, r in there]],
            fmt="o",
            color=COLOURS[name],
            label=name,
            elinewidth=1,
            alpha=0.9,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(cells)), [cell.what for cell in cells])
    axes.invert_yaxis()
    axes.set_xlabel("rate of tproxy-relay / rate of the other, median and range of rounds")
    _finish(figure, axes, path)


def curve(run: dict[str, Any], path: Path) -> None:
    """Both axes logarithmic."""
    cells = [cell for cell in CELLS if cell.group == "curve" and cell.name in run["rounds"]]
    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for name in ("relay", *SHOWN):
        found = [(int(cell.name[5:]), figures.middle(run["rounds"][cell.name], name, "rate")) for cell in cells]
        there = [(count, rate) for count, rate in found if rate is not None]
        if there:
            axes.plot(*zip(*there), marker="o", color=COLOURS[name], label=name, linewidth=2 if name == "relay" else 1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("connections, one request on its way in each")
    axes.set_ylabel("requests/s")
    _finish(figure, axes, path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    for spine in axes.spines.values():
        spine.set_color(INK)
    axes.tick_params(colors=INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    axes.grid(True, color=INK, alpha=0.25)
    for text in axes.legend(frameon=False).get_texts():
        text.set_color(INK)
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
