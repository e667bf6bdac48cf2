"""The arithmetic of the bench, and that its parts fit together: cells, targets, table, comparison."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import cells  # noqa: E402
import compare  # noqa: E402
import figures  # noqa: E402
import pytest  # noqa: E402
import report  # noqa: E402
from targets import TARGETS, Target  # noqa: E402

ROUNDS = [
    {"relay": {"rate": 50.0, "p99": 4.0}, "c": {"rate": 100.0, "p99": 2.0}},
    {"relay": {"rate": 90.0, "p99": 2.0}, "c": {"rate": 100.0, "p99": 2.0}},
    {"relay": {"rate": 300.0, "p99": 1.0}, "c": {"rate": 200.0, "p99": 2.0}},
    {"relay": {"rate": 1000.0}},
]
"""c has failed in the last one."""


def run(rounds: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    return {"machine": {"commit": "0123456"}, "rounds": {"rr32": rounds}}


def test_medians_over_rounds_and_of_ratios_within_them() -> None:
    assert figures.middle(ROUNDS, "relay", "rate") == 195.0
    assert figures.middle(ROUNDS, "relay", "p50") is figures.middle(ROUNDS, "go", "rate") is None
    ratio = figures.ratio(ROUNDS, "rate", "relay", "c")
    assert ratio == (0.9, 0.5, 1.5) and str(ratio) == "0.90 [0.50-1.50]"
    assert figures.ratio(ROUNDS, "rate", "relay", "go") is None


@pytest.mark.parametrize(
    "target, reached, word",
    [
        (Target("rr32", "rate", "c", 0.9, 1.0), 0.9, "ok"),
        (Target("rr32", "rate", "c", 0.5, 0.9), 0.9, "goal"),
        (Target("rr32", "rate", "c", 0.91), 0.9, "SHORT"),
        (Target("rr32", "p99", "c", 1.0, least=False), 1.0, "ok"),
        (Target("rr32", "p99", "c", 0.9, least=False), 1.0, "SHORT"),
        (Target("rr32", "rate", None, 190), 195.0, "ok"),
    ],
)
def test_what_is_reached(target: Target, reached: float, word: str) -> None:
    assert figures.judged(target, ROUNDS) == (reached, word)


def test_what_was_not_measured_is_not_judged() -> None:
    assert figures.judged(Target("rr32", "rate", "envoy", 1.0), ROUNDS) is None
    assert figures.judged(Target("rr32", "rate", "c", 1.0), []) is None


def test_the_targets_name_cells_that_there_are() -> None:
    names = [cell.name for cell in cells.CELLS]
    assert len(set(names)) == len(names)
    assert {target.cell for target in TARGETS} <= set(names)


def test_the_table_shows_the_ratio_and_the_target() -> None:
    text = report.table(run(ROUNDS))
    assert "| requests, 32 connections | rate | 195 /s | 0.90 [0.50-1.50] |" in text
    assert "| rr32 rate x c | >= 0.95 |  | 0.9 | SHORT |" in text


def test_only_what_lies_apart_is_a_change() -> None:
    slower = [{"relay": {"rate": 40.0}, "c": {"rate": 100.0}}] * 3
    found = list(compare.changes(run(ROUNDS), run(slower)))
    assert [change[:4] for change in found] == [("rr32", "rate", "c", True)]
    assert list(compare.changes(run(ROUNDS), run(ROUNDS))) == []
    within = [{"relay": {"rate": 60.0}, "c": {"rate": 100.0}}]
    assert list(compare.changes(run(ROUNDS), run(within))) == []
