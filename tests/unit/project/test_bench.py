"""The arithmetic of the bench, and that its parts fit together: cells, targets, tables, comparison."""

import csv
from pathlib import Path
from typing import Any

import cells
import company
import compare
import figures
import pytest
import report
from targets import TARGETS, Target
from usage import Look, Spent

ROUNDS = [
    {"relay": {"rate": 50.0, "p99": 0.004}, "c": {"rate": 100.0, "p99": 0.002}},
    {"relay": {"rate": 90.0, "p99": 0.002}, "c": {"rate": 100.0, "p99": 0.002}},
    {"relay": {"rate": 300.0, "p99": 0.001}, "c": {"rate": 200.0, "p99": 0.002}},
    {"relay": {"rate": 1000.0}},
]
"""c has failed in the last one."""


def run(rounds: list[dict[str, dict[str, float]]], cell: str = "rr32") -> dict[str, Any]:
    return {"versions": {"relay": "1.0"}, "noisy": 0, "failures": [], "rounds": {cell: rounds}}


def test_medians_over_rounds_and_of_ratios_within_them() -> None:
    assert figures.of_peer(ROUNDS, "relay", "rate") == (195.0, 50.0, 1000.0)
    assert figures.of_peer(ROUNDS, "relay", "p50") is figures.of_peer(ROUNDS, "go", "rate") is None
    ratio = figures.ratio(ROUNDS, "rate", "c")
    assert ratio == (0.9, 0.5, 1.5) and str(ratio) == "0.90 (0.50-1.50)"
    assert figures.ratio(ROUNDS, "rate", "go") is None


@pytest.mark.parametrize(
    "target, reached, met, words",
    [
        (Target("rr32", "rate", "c", 0.9), 0.9, True, "ok"),
        (Target("rr32", "rate", "c", 0.9, 1.0), 0.9, True, "ok; 10% to the goal"),
        (Target("rr32", "rate", "c", 0.5, 0.9), 0.9, True, "ok, and the goal"),
        (Target("rr32", "rate", "c", 1.0, 1.2), 0.9, False, "short by 10%"),
        (Target("rr32", "rate", "c", None, 1.0), 0.9, True, "ok; 10% to the goal"),
        (Target("rr32", "p99", "c", 1.0, least=False), 1.0, True, "ok"),
        (Target("rr32", "p99", "c", 0.8, least=False), 1.0, False, "short by 25%"),
        (Target("rr32", "p99", "c", 0.8, least=False, enough=0.002), 1.0, True, "ok"),
        (Target("rr32", "p99", "c", 0.8, least=False, enough=0.001), 1.0, False, "short by 25%"),
        (Target("rr32", "rate", None, 190), 195.0, True, "ok"),
        (Target("rr32", "rate", None, 0, least=False), 195.0, False, "short by 195"),
    ],
)
def test_what_is_reached(target: Target, reached: float, met: bool, words: str) -> None:
    assert figures.judged(target, ROUNDS) == (reached, met, words)


def test_what_was_not_measured_is_not_judged() -> None:
    assert figures.judged(Target("rr32", "rate", "envoy", 1.0), ROUNDS) is None
    assert figures.judged(Target("rr32", "rate", "c", 1.0), []) is None


def test_names_are_unique_and_targets_name_what_there_is() -> None:
    shown = {cell.name: cell.shown for cell in cells.CELLS}
    assert len(shown) == len(cells.CELLS) and not set(shown) & {cell.group for cell in cells.CELLS} - {"mixed"}
    for target in TARGETS:
        assert target.figure in shown[target.cell]
        assert target.peer is None or target.peer in company.KINDS


def test_the_tables_show_figures_ratios_and_targets() -> None:
    text = report.tables(run(ROUNDS))
    assert "| requests, 32 connections | rate | 195 /s | 100 /s |" in text
    assert "| requests, 32 connections | p99 | 2 ms | 2 ms |" in text
    assert "| requests, 32 connections | rate | 0.90 (0.50-1.50) |" in text
    assert "| rr32 rate x c | >= 0.95 |  | 0.90 | short by 5% |" in text
    assert "haproxy" not in text


def test_the_tables_are_files_for_the_manual_too(tmp_path: Path) -> None:
    report.write_csv(run(ROUNDS), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.csv", "ratios.csv", "targets.csv"]
    rows = list(csv.reader((tmp_path / "ratios.csv").read_text(encoding="utf-8").splitlines()))
    assert rows[:2] == [["ratios", "", "x c"], ["requests, 32 connections", "rate", "0.90 (0.50-1.50)"]]
    (tmp_path / "without").mkdir()
    report.write_csv(run([{"c": {"rate": 1.0}}]), tmp_path / "without")
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["figures.csv"], "there is nothing to compare"


def test_where_it_was_measured() -> None:
    machine = {"time": "2026-11-23T17:00:00Z", "processors": 2, "model": "EPYC", "kernel": "6.18"}
    said = report.about({**run(ROUNDS), "machine": machine})
    assert said == "Measured on 2026-11-23, 2 processors (EPYC), Linux 6.18, 4 rounds at most. relay: 1.0.\n"


def test_what_others_have_used_is_what_is_in_no_account_of_ours() -> None:
    before = Look(relay=1.0, bench=2.0, working=10.0, idle=20.0, stolen=0.0, passed=40.0)
    after = Look(relay=1.5, bench=3.0, working=11.2, idle=20.4, stolen=0.2, passed=42.0)
    assert Spent.between(before, after) == pytest.approx((0.5, 0.2, 0.1, 0.1))


def test_only_what_lies_apart_is_a_change() -> None:
    slower = [{"relay": {"rate": 40.0}, "c": {"rate": 100.0}}] * 3
    (change,) = compare.changes(run(ROUNDS), run(slower))
    assert change[:4] == ("rr32", "rate", "c", False) and str(change).startswith("WORSE  rr32")
    (back,) = compare.changes(run(slower), run(ROUNDS))
    assert back.better
    assert list(compare.changes(run(ROUNDS), run(ROUNDS))) == []
    within = [{"relay": {"rate": 60.0}, "c": {"rate": 100.0}}]
    assert list(compare.changes(run(ROUNDS), run(within))) == []


def test_memory_is_compared_by_itself() -> None:
    small, large = ([{"relay": {"rss_per_connection": size}, "c": {"rss_per_connection": size}}] for size in (4e4, 5e4))
    (change,) = compare.changes(run(small, "idle1000"), run(large, "idle1000"))
    assert (change.peer, change.better) == (None, False)
