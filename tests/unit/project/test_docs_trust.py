"""The page about trust: each promise has rows, each row has a test, and the table is that of the tests."""

import ast
import csv
import re
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[2]
DOCS = TESTS.parent / "docs"
PAGE = (DOCS / "trust.rst").read_text(encoding="utf-8")


def kept() -> list[dict[str, str]]:
    """The table of the manual."""
    with (DOCS / "faults.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def marks() -> Iterator[tuple[str, str, str, str]]:
    """Row, what is done, limit, and test: all there are in the tests."""
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.row":
                    number, done, limit = (ast.literal_eval(argument) for argument in decorator.args)
                    yield number, done, limit, f"{path.relative_to(TESTS.parent)}::{getattr(node, 'name')}"


def promises() -> list[str]:
    """The numbered ones."""
    text = PAGE[PAGE.index("The promises\n") : PAGE.index("What is not promised")]
    return re.split(r"\n *\d+\. ", text)[1:]


def test_the_table_is_that_of_the_tests() -> None:
    in_manual = {
        (row["row"], row["what was done"], row["limit"], test) for row in kept() for test in row["test"].split(", ")
    }
    assert in_manual == set(marks()), "python tests/faults/table.py --keep"
    assert not [row for row in kept() if "NOT SHOWN" in row["seen"] or not row["seen"]]


def test_each_promise_has_rows_and_each_row_a_promise() -> None:
    rows = [set(re.findall(r"\b[LFHBS]\d+\b", promise)) for promise in promises()]
    assert len(rows) == 12 and all(rows)
    assert set().union(*rows) == {number for number, *_ in marks()}


def test_the_programs_that_it_names_exist() -> None:
    for program in re.findall(r"``python (tests/\S+?\.py)", PAGE):
        assert (TESTS.parent / program).is_file(), program
