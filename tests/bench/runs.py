"""Files of runs: several read as one, and what is kept of a run for later ones to be compared with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cells import CELLS
from report import bare

BASELINE = Path(__file__).with_name("baseline.json")
"""The run that new ones are compared with if no other is named."""
DIGITS = 4


def load(paths: Sequence[str | Path]) -> dict[str, Any]:
    """The runs as one that has the rounds of all. Raises ValueError if they are of different programs."""
    first, *others = (json.loads(Path(path).read_text("utf-8")) for path in paths)
    whole: dict[str, Any] = first
    for run in others:
        if any(whole["versions"].get(name, version) != version for name, version in run["versions"].items()):
            raise ValueError(f"not the same programs: {whole['versions']} and {run['versions']}")
        whole["versions"].update(run["versions"])
        for cell, rounds in run["rounds"].items():
            whole["rounds"].setdefault(cell, []).extend(rounds)
        for name in ("failures", "warnings"):
            whole[name] += run[name]
        whole["noisy"] += run["noisy"]
    return whole


def store(run: dict[str, Any], path: Path) -> None:
    """Write what compare.py looks at: the figures of the tables, and no names of files or machines."""
    rounds = {
        cell.name: [
            {
                peer: {name: float(f"{of[name]:.{DIGITS}g}") for name in cell.shown if of.get(name) is not None}
                for peer, of in one.items()
            }
            for one in run["rounds"][cell.name]
        ]
        for cell in CELLS
        if cell.name in run["rounds"]
    }
    versions = {name: bare(version) for name, version in run["versions"].items()}
    kept = {"versions": versions, "noisy": run["noisy"], "failures": run["failures"]}
    head = json.dumps(kept, indent=1)[:-2]
    cells = ",\n".join(f"  {json.dumps(name)}: {json.dumps(of, separators=(',', ':'))}" for name, of in rounds.items())
    path.write_text(f'{head},\n "rounds": {{\n{cells}\n }}\n}}\n', encoding="utf-8")
