"""The tables of a run: what each relay reached, ours beside the others, and what was wanted."""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import figures
from cells import CELLS, Cell
from figures import OURS, Rounds, Spread
from targets import TARGETS, Target

_UNITS = {
    "throughput": ("Gbit/s", 1e-9),
    "beside_throughput": ("Gbit/s", 1e-9),
    "rate": ("/s", 1.0),
    "open_seconds": ("s", 1.0),
    "rss_per_connection": ("KiB", 1 / 1024),
    "cpu_per_item": ("us", 1e6),
    "cpu_per_gb": ("s/GB", 1.0),
    **{name: ("ms", 1e3) for name in ("p50", "p90", "p99", "p999", "max", "round_p99")},
}
_CPU = {"throughput": "cpu_per_gb", "rate": "cpu_per_item"}
"""The cost that belongs to a figure."""


Rows = list[list[str]]


def tables(result: dict[str, Any]) -> str:
    """All of them, in Markdown."""
    return "\n\n".join(_table(rows) for rows in _all(result).values())


def write_csv(result: dict[str, Any], folder: Path) -> None:
    """A file for each, for the manual: figures.csv, ratios.csv, targets.csv."""
    for name, rows in _all(result).items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def about(result: dict[str, Any]) -> str:
    """A sentence about the machine and the programs, in reStructuredText."""
    machine, rounds = result["machine"], max(map(len, result["rounds"].values()))
    programs = "; ".join(f"{name}: {bare(version)}" for name, version in result["versions"].items() if version)
    return (
        f"Measured on {machine['time'][:10]}, {machine['processors']} processors ({machine['model']}), "
        f"Linux {machine['kernel']}, {rounds} rounds at most. {programs}.\n"
    )


def bare(version: str) -> str:
    """Without the place where the program is, and whose it is."""
    return re.sub(r"\S*/(\w+) +version: |  *- http\S*", "", version)


def _all(result: dict[str, Any]) -> dict[str, Rows]:
    """Those that have something in them, each with its head."""
    rounds: dict[str, Rounds] = result["rounds"]
    names = _peers(rounds)
    others = [name for name in names if name != OURS]
    every: dict[str, Rows] = {
        "figures": [["figures", "", *names], *_figures(rounds, names)],
        "ratios": [["ratios", "", *(f"x {name}" for name in others)], *_ratios(rounds, others)],
        "targets": [["target", "must", "goal", "reached", ""], *_targets(rounds)],
    }
    return {name: rows for name, rows in every.items() if len(rows) > 1}


def shown(figure: str, value: float | None) -> str:
    """With its unit."""
    if value is None:
        return "-"
    unit, factor = _UNITS.get(figure, ("", 1.0))
    value *= factor
    return f"{value:,.0f} {unit}".strip() if abs(value) >= 1000 else f"{value:.3g} {unit}".strip()


def _peers(rounds: dict[str, Rounds]) -> list[str]:
    found = {name: None for every in rounds.values() for one in every for name in one}
    return [OURS, *(name for name in found if name != OURS)]


def _rows(rounds: dict[str, Rounds]) -> Iterator[tuple[Cell, str]]:
    for cell in CELLS:
        for figure in cell.shown if cell.name in rounds else ():
            yield cell, figure


def _figures(rounds: dict[str, Rounds], names: list[str]) -> Iterator[list[str]]:
    """Medians; and what it costs, of the processors."""
    for cell, figure in _rows(rounds):
        found = [figures.of_peer(rounds[cell.name], name, figure) for name in names]
        yield [cell.what, figure, *(shown(figure, None if one is None else one.median) for one in found)]
        cost = _CPU.get(figure)
        found = [figures.of_peer(rounds[cell.name], name, cost) for name in names] if cost else []
        if cost and any(found):
            yield [cell.what, cost, *(shown(cost, None if one is None else one.median or None) for one in found)]


def _ratios(rounds: dict[str, Rounds], names: list[str]) -> Iterator[list[str]]:
    for cell, figure in _rows(rounds):
        found = [figures.ratio(rounds[cell.name], figure, name) for name in names]
        if any(found):
            yield [cell.what, figure, *map(_or_dash, found)]


def _targets(rounds: dict[str, Rounds]) -> Iterator[list[str]]:
    for target in TARGETS:
        judgement = figures.judged(target, rounds.get(target.cell, []))
        if judgement is not None:
            against = "" if target.peer is None else f" x {target.peer}"
            name = f"{target.cell} {target.figure}{against}"
            reached = _wanted(target, judgement.reached).strip()
            yield [name, _must(target), _wanted(target, target.goal), reached, judgement.words]


def _must(target: Target) -> str:
    if target.must is None:
        return ""
    other = "" if target.enough is None else f" or {shown(target.figure, target.enough)}"
    return f"{'>=' if target.least else '<='} {_wanted(target, target.must)}{other}"


def _wanted(target: Target, value: float | None) -> str:
    if value is None:
        return ""
    return shown(target.figure, value) if target.peer is None else f"{value:.2f}"


def _or_dash(one: Spread | None) -> str:
    return "-" if one is None else str(one)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *found = [" | ".join(row) for row in rows]
    lines = [head, "|".join("---" for _ in rows[0]), *found]
    return "\n".join(f"| {line} |" if "---|" not in line else f"|{line}|" for line in lines)
