"""The page on the design says what is: folders and files, directions, and two ways through them as lists of calls."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from package_source import PACKAGE, tree_of

PAGE = (Path(__file__).parents[3] / "docs" / "design.rst").read_text(encoding="utf-8")
WAYS = ("The way of a connection", "The way of a setting")


class Step(NamedTuple):
    """One line of a way: where a function stands, and its name."""

    file: str
    name: str


def section(title: str) -> str:
    return re.split(r"\n[^\n]+\n[-=]{5,}\n", PAGE.partition(f"\n{title}\n{'-' * len(title)}\n")[2])[0]


def steps(title: str) -> list[Step]:
    found = re.findall(r"^    ([a-z_]+/[a-z_]+) +([\w.]+)(?:  .*)?$", section(title), re.MULTILINE)
    return [Step(*one) for one in found]


def source(step: Step) -> ast.AST | None:
    """The definition; None if there is none."""
    node: ast.AST | None = tree_of(PACKAGE / f"{step.file}.py")
    for part in step.name.split("."):
        inside = getattr(node, "body", [])
        node = next((one for one in inside if getattr(one, "name", None) == part), None)
    return node


def names_in(node: ast.AST) -> set[str]:
    """What it calls, or has called."""
    return {one.attr if isinstance(one, ast.Attribute) else one.id for one in ast.walk(node)
            if isinstance(one, (ast.Attribute, ast.Name))}  # fmt: skip


def called_as(step: Step) -> str:
    owner, _, name = step.name.rpartition(".")
    return owner if name == "__init__" else name


def rows() -> list[set[str]]:
    """The directions, from the top down."""
    block = section("The house").partition("Imports point downwards only::\n\n")[2].partition("\n\n")[0]
    return [set(line.split()) for line in block.splitlines()]


def rank(step: Step) -> int:
    folder = step.file.partition("/")[0]
    return next(number for number, row in enumerate(rows()) if folder in row)


def test_each_folder_is_there_with_the_files_that_it_names() -> None:
    entries = re.findall(r"   \* - (``[a-z]+/``(?:, ``[a-z]+/``)*)\n     - (.*?)(?=\n   \* -|\n\n)", PAGE, re.DOTALL)
    named = {folder for folders, _ in entries for folder in re.findall(r"``(\w+)/``", folders)}
    assert named == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for folders, text in entries:
        (folder, *more) = re.findall(r"``(\w+)/``", folders)
        for module in [] if more else re.findall(r"``(\w+)``", text):
            assert (PACKAGE / folder / f"{module}.py").is_file() or module == "Settings", f"{folder}/{module}"


def test_the_directions_are_those_that_are_tested() -> None:
    tested = (Path(__file__).parent / "test_layers.py").read_text(encoding="utf-8")
    (layers,) = (node for node in ast.parse(tested).body if isinstance(node, ast.Assign) and
                 getattr(node.targets[0], "id", "") == "LAYERS")  # fmt: skip
    assert [set(row) for row in ast.literal_eval(layers.value)[:-1]] == rows()


@pytest.mark.parametrize("title", WAYS)
def test_each_step_is_called_by_one_above_it(title: str) -> None:
    above: set[str] = set()
    for number, step in enumerate(steps(title)):
        definition = source(step)
        assert definition is not None, f"{step.file} has no {step.name}"
        elsewhere = step == Step("worker/__main__", "main")  # a process of its own
        assert number == 0 or elsewhere or called_as(step) in above, f"nobody above calls {step.name}"
        above |= names_in(definition)
    assert len(steps(title)) > 15


@pytest.mark.parametrize("title", WAYS)
def test_no_step_goes_up_by_a_callback(title: str) -> None:
    """A folder further up may only go on with what its own call has returned."""
    way = steps(title)
    for before, step in zip(way, way[1:]):
        if rank(step) < rank(before):
            callers = [
                one for one in way[: way.index(step)] if called_as(step) in names_in(source(one) or ast.Module())
            ]
            assert any(rank(one) <= rank(step) for one in callers), f"{before.name} goes up to {step.name}"
