"""The table of a run: what was measured, beside what the others reach and what was wanted."""

from typing import Any

import figures
from cells import CELLS, Cell
from figures import Rounds
from targets import TARGETS

_UNITS = {
    "rate": ("/s", 1.0),
    "p99": ("ms", 1e3),
    "rss_per_connection": ("KiB", 1 / 1024),
    "round_p99": ("ms", 1e3),
    "rss_ratio": ("x", 1.0),
}


def table(result: dict[str, Any]) -> str:
    """In the form of Markdown."""
    rounds: dict[str, Rounds] = result["rounds"]
    names = [name for name in _peers(rounds) if name != "relay"]
    lines = [
        "| work | figure | relay | " + " | ".join(f"x {name}" for name in names) + " | CPU us |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for cell in CELLS:
        if cell.name in rounds:
            lines += _rows(cell, rounds[cell.name], names)
    lines += ["", *_targets(rounds)]
    return "\n".join(lines)


def _peers(rounds: dict[str, Rounds]) -> list[str]:
    found: dict[str, None] = {}
    for every in rounds.values():
        for one in every:
            found.update(dict.fromkeys(one))
    return list(found)


def _rows(cell: Cell, rounds: Rounds, names: list[str]) -> list[str]:
    shown = [cell.main, *(["p99"] if cell.group in ("rr", "conn") else [])]
    shown += ["open_seconds"] if cell.group == "idle" and cell.main != "rss_ratio" else []
    rows = []
    for figure in shown:
        ours = figures.middle(rounds, "relay", figure)
        ratios = [figures.ratio(rounds, figure, "relay", name) for name in names]
        cpu = figures.middle(rounds, "relay", "cpu_per_item")
        rows.append(
            f"| {cell.what} | {figure} | {_shown(cell, figure, ours)} | "
            + " | ".join("-" if one is None else str(one) for one in ratios)
            + f" | {'' if cpu is None or figure != cell.main else f'{cpu * 1e6:.0f}'} |"
        )
    return rows


def _shown(cell: Cell, figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if cell.group in ("bulk", "v6") and figure == "rate" and value > 1e8:
        return f"{value / 1e9:.1f} Gbit/s"
    unit, factor = _UNITS.get(figure, ("", 1.0))
    return f"{value * factor:,.4g} {unit}".strip()


def _targets(rounds: dict[str, Rounds]) -> list[str]:
    lines = ["| target | must | goal | reached | |", "|---|---|---|---|---|"]
    for target in TARGETS:
        judged = figures.judged(target, rounds.get(target.cell, []))
        if judged is not None:
            sign = ">=" if target.least else "<="
            against = f" x {target.peer}" if target.peer else ""
            goal = "" if target.goal is None else f"{target.goal:g}"
            wanted = f"{target.cell} {target.figure}{against} | {sign} {target.must:g} | {goal}"
            lines.append(f"| {wanted} | {judged[0]:.4g} | {judged[1]} |")
    return lines
