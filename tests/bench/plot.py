"""Pictures and tables of a run for the manual: python tests/bench/plot.py RUN.json [RUN.json ...] FOLDER

figures.csv, ratios.csv, targets.csv: the tables that run.py prints; run.rst: where and with what it was measured.
ratios.svg: the rates of the relay, as a part of each other relay's. If the group `curve` was measured, curve.svg: rate,
latency and processor time of requests over the number of connections. Needs matplotlib (pip install '.[bench]').
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import figures  # noqa: E402
import matplotlib  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
from cells import BULK, CELLS, RATE  # noqa: E402
from figures import OURS  # noqa: E402

matplotlib.use("svg")
# Text stays text, and the same run makes the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tproxy-relay", "font.size": 10})

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import LogLocator  # noqa: E402

STYLE = {
    OURS: ("tproxy-relay", "#d1495b", "o"),
    "haproxy": ("HAProxy", "#00899c", "s"),
    "envoy": ("Envoy", "#c98f1b", "^"),
    "go": ("Go", "#4f9a6b", "D"),
    "c": ("C, same shape", "#9a72b0", "v"),
    "direct": ("no relay", "#808080", "x"),
}
"""Name, colour and mark: colours that can be read on white and on black, and marks without colours."""
INK = "#808080"
PANELS = (
    ("rate", "requests/s", 1.0),
    ("p99", "p99, ms", 1e3),
    ("cpu_per_item", "processor time\nper request, us", 1e6),
)


def main(argv: Sequence[str]) -> int:
    """Returns 2 for a wrong command line."""
    if len(argv) < 2:
        print((__doc__ or "").split("\n", 1)[0], file=sys.stderr)
        return 2
    run, folder = runs.load(argv[:-1]), Path(argv[-1])
    folder.mkdir(parents=True, exist_ok=True)
    report.write_csv(run, folder)
    (folder / "run.rst").write_text(report.about(run), encoding="utf-8")
    ratios(run, folder / "ratios.svg")
    if any(name.startswith("curve") for name in run["rounds"]):
        curve(run, folder / "curve.svg")
    return 0


def ratios(run: dict[str, Any], path: Path) -> None:
    """More is better; a line for each cell, a mark for each other relay, and the range of the rounds."""
    cells = [
        cell for cell in CELLS if cell.main in (BULK, RATE) and cell.name in run["rounds"] and cell.group != "curve"
    ]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(cells)))
    for place, (name, (label, colour, mark)) in enumerate(STYLE.items()):
        found = [(row, figures.ratio(run["rounds"][cell.name], cell.main, name)) for row, cell in enumerate(cells)]
        # Above each other, so that none hides another.
        there = [(row + 0.14 * (place - 3), ratio) for row, ratio in found if ratio is not None and name != OURS]
        if there:
            axes.errorbar(
                [ratio.median for _, ratio in there],
                [row for row, _ in there],
                xerr=[[r.median - r.least for _, r in there], [r.most - r.median for _, r in there]],
                fmt=mark,
                color=colour,
                label=label,
                elinewidth=1,
                markersize=4,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(cells)), [cell.what for cell in cells])
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_xlabel("tproxy-relay / the other: median, and range of the rounds")
    _finish(figure, [axes], path)


def curve(run: dict[str, Any], path: Path) -> None:
    """Both axes logarithmic."""
    cells = [cell for cell in CELLS if cell.group == "curve" and cell.name in run["rounds"]]
    figure, panels = pyplot.subplots(len(PANELS), figsize=(8, 9), sharex=True)
    for axes, (name_of_figure, words, factor) in zip(panels, PANELS):
        for name, (label, colour, mark) in STYLE.items():
            found = [
                (cell.connections, figures.of_peer(run["rounds"][cell.name], name, name_of_figure)) for cell in cells
            ]
            there = [(count, one.median * factor) for count, one in found if one is not None and one.median]
            if there:
                width = 2.0 if name == OURS else 1.0
                axes.plot(*zip(*there), marker=mark, color=colour, label=label, linewidth=width, markersize=4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.set_ylabel(words)
    panels[-1].set_xlabel("connections, one request on its way in each")
    _finish(figure, list(panels), path)


def _finish(figure: Figure, panels: Sequence[Axes], path: Path) -> None:
    """No background: the page's own shows."""
    for axes in panels:
        for spine in axes.spines.values():
            spine.set_color(INK)
        axes.tick_params(which="both", colors=INK)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
        axes.grid(True, color=INK, alpha=0.25)
    if panels[0].get_legend_handles_labels()[0]:
        legend = panels[0].legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        for text in legend.get_texts():
            text.set_color(INK)
    figure.align_ylabels()
    figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
