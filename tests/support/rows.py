"""The rows of the fault table: what was done to the relay, within which limit it had to stay, and what was seen.

A test that shows a row says so with `@pytest.mark.row("F1", "what is done", "what must be seen")`, and says what it saw
by calling the fixture `seen`; otherwise it saw what was wanted. `pytest --rows FILE` writes all that ran as JSON;
tests/faults/table.py makes the table of the manual out of it. Rows are named by a letter for their kind (L load, F
peers and network, H the relay and its host, B bad input, S security) and a number.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

SEEN, ROW = "seen", "row"


@dataclass(frozen=True)
class Row:
    """One test's part of a row."""

    number: str
    done: str
    limit: str
    seen: tuple[str, ...]
    test: str
    passed: bool


class Seen:
    """Call it with what was seen, in the words of the row's limit."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item

    def __call__(self, text: str, number: str = "") -> None:
        """`number`: of the only row that this is about, if the test has several."""
        self._item.user_properties.append((SEEN, [number, text]))


def note(item: pytest.Item) -> None:
    """Put its rows on a test's report, which may cross over from another process. ValueError if one is not whole."""
    for mark in item.iter_markers(ROW):
        if len(mark.args) != 3 or mark.kwargs or not all(isinstance(part, str) for part in mark.args):
            raise ValueError(f"{item.nodeid}: a row is a number, what is done, and its limit")
        item.user_properties.append((ROW, list(mark.args)))


class Table:
    """Gathers the rows of a run and writes them in the end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has run, or was not even set up."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._rows += rows_of(report)

    def pytest_sessionfinish(self) -> None:
        """All have run."""
        self._path.write_text(json.dumps([asdict(row) for row in self._rows], indent=1), encoding="utf-8")


def rows_of(report: pytest.TestReport) -> Iterator[Row]:
    """Those that this test shows."""
    properties: list[tuple[str, Any]] = report.user_properties
    said = [value for name, value in properties if name == SEEN]
    for name, value in properties:
        if name == ROW:
            seen = tuple(text for number, text in said if number in ("", value[0]))
            yield Row(*value, seen=seen or ("as wanted",), test=report.nodeid, passed=report.passed)
