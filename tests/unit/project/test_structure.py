"""How large the package's parts have become, and how many of them there are: limits, and the largest of each kind.

`pytest -s` prints the measures. When a test here is red, a part tells two stories and wants to be split; a limit is not
moved for one.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from package_source import PACKAGE, all_imports, module_of, place_of, sources, tree_of

LONG_FILES = {"config/options.py"}
"""The table of options is one table."""

PARAMETERS = {"Worker": 6, "Acceptor": 4, "WorkerContext": 7}
"""Of these classes fewer than of others; the fields, where a dataclass makes the constructor. The fields of others are
not counted: a record has as many as there are facts."""

MAX_PLACES = 24
"""Modules and folders at the top of the package, `__init__` and `__main__` included."""
MAX_ARROWS = 50
"""Pairs of folders of which one imports from the other."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Size(NamedTuple):
    """Of one part: lines, or parameters."""

    size: int
    part: str

    def __str__(self) -> str:
        return f"{self.size} {self.part}"


def files(package: Path) -> Iterator[Size]:
    """Lines of each, but of those that may be long."""
    for path in sources(package):
        if str(name := path.relative_to(package)) not in LONG_FILES:
            yield Size(len(path.read_text(encoding="utf-8").splitlines()), str(name))


def definitions(package: Path) -> Iterator[tuple[str, ast.AST]]:
    """FILE:LINE, and whatever stands there."""
    for path in sources(package):
        for node in ast.walk(tree_of(path)):
            yield f"{path.relative_to(package)}:{getattr(node, 'lineno', 0)}", node


def classes(package: Path) -> Iterator[Size]:
    """Lines of each."""
    for where, node in definitions(package):
        if isinstance(node, ast.ClassDef):
            yield Size(lines(node), f"{where} {node.name}")


def functions(package: Path) -> Iterator[Size]:
    """Lines of each, methods and inner ones, too."""
    for where, node in definitions(package):
        if isinstance(node, Function):
            yield Size(lines(node), f"{where} {node.name}")


def lines(node: ast.stmt) -> int:
    """From its name to its end, without decorators."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def constructors(package: Path) -> Iterator[Size]:
    """Parameters of each that is written out, and the fields of the classes in PARAMETERS."""
    for where, node in definitions(package):
        if isinstance(node, ast.ClassDef) and (count := parameters(node)) is not None:
            yield Size(count, f"{where} {node.name}")


def parameters(node: ast.ClassDef) -> int | None:
    """Without `self`; None if nobody has written a constructor, and the fields are not to be counted."""
    for method in node.body:
        if isinstance(method, Function) and method.name == "__init__":
            found = method.args
            several = [one for one in (found.vararg, found.kwarg) if one is not None]
            return len([*found.posonlyargs, *found.args, *found.kwonlyargs, *several]) - 1
    fields = sum(isinstance(statement, ast.AnnAssign) for statement in node.body)
    return fields if fields and node.name in PARAMETERS else None


def places(package: Path) -> set[str]:
    """What one finds at the top of it."""
    return {module_of(path, package).partition(".")[0] for path in sources(package)}


def arrows(package: Path) -> set[tuple[str, str]]:
    """Which folder imports from which other."""
    found = {(place_of(one.importer), place_of(one.imported)) for one in all_imports(package)}
    return {pair for pair in found if pair[0] != pair[1] and all((package / place).is_dir() for place in pair)}


def too_large(kind: Callable[[Path], Iterator[Size]], limit: int, package: Path) -> list[str]:
    """The parts above the limit, the largest first."""
    return [str(one) for one in sorted(kind(package), reverse=True) if one.size > limit]


def too_many_parameters(package: Path) -> list[str]:
    """The same, for the classes that have a limit of their own; and those that are not there."""
    sizes = [(one.part.rpartition(" ")[2], one) for one in constructors(package)]
    wrong = [f"{one}: at most {PARAMETERS[name]}" for name, one in sizes if one.size > PARAMETERS.get(name, one.size)]
    return wrong + [f"no class {name}" for name in PARAMETERS if name not in dict(sizes)]


LIMITS = {files: 350, classes: 260, functions: 45, constructors: 8}
KINDS = pytest.mark.parametrize(("kind", "limit"), LIMITS.items(), ids=[kind.__name__ for kind in LIMITS])


@KINDS
def test_nothing_is_too_large(kind: Callable[[Path], Iterator[Size]], limit: int) -> None:
    print(f"the largest of the {kind.__name__}: {max(kind(PACKAGE))}; limit {limit}")
    assert not (wrong := too_large(kind, limit, PACKAGE)), f"more than {limit}:\n" + "\n".join(wrong)


def test_the_long_files_are_there() -> None:
    assert all((PACKAGE / name).is_file() for name in LONG_FILES)


def test_some_constructors_take_less() -> None:
    assert not (wrong := too_many_parameters(PACKAGE)), "\n".join(wrong)


def test_the_top_of_the_package_is_seen_at_a_glance() -> None:
    found = sorted(places(PACKAGE))
    print(f"{len(found)} places at the top of the package; limit {MAX_PLACES}")
    assert len(found) <= MAX_PLACES, found


def test_few_folders_know_each_other() -> None:
    found = sorted(arrows(PACKAGE))
    print(f"{len(found)} arrows between folders; limit {MAX_ARROWS}")
    assert len(found) <= MAX_ARROWS, "\n".join(f"{upper} -> {lower}" for upper, lower in found)


# --- does the guard bark?


def written(package: Path, name: str, text: str) -> Path:
    """The package, with this file in it."""
    path = package / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return package


def part(kind: Callable[[Path], Iterator[Size]], size: int) -> str:
    """The source of one that is so large."""
    if kind is constructors:
        return f"class One:\n    def __init__({', '.join(['self', *(f'a{number}' for number in range(size))])}): pass\n"
    body = (size - 1) * "    pass\n"
    return {files: "#\n" + (size - 1) * "pass\n", classes: f"class One:\n{body}", functions: f"def one():\n{body}"}[
        kind
    ]


@KINDS
def test_a_part_at_its_limit_is_fine_and_one_above_is_named(
    kind: Callable[[Path], Iterator[Size]], limit: int, tmp_path: Path
) -> None:
    assert too_large(kind, limit, written(tmp_path, "net/leaf.py", part(kind, limit))) == []
    (told,) = too_large(kind, limit, written(tmp_path, "net/leaf.py", part(kind, limit + 1)))
    assert re.match(rf"{limit + 1} net/leaf\.py", told)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("class One:\n    def __init__(self, a, /, b, *, c=1): pass\n", [3]),
        ("class One:\n    def __init__(self, *a, **b): pass\n", [2]),
        ("@dataclass\nclass One:\n    a: int\n    b: int\n", []),
        ("@dataclass\nclass WorkerContext:\n    a: int\n    b: int\n", [2]),
        ("class One: pass\n", []),
    ],
)
def test_how_parameters_are_counted(source: str, count: list[int], tmp_path: Path) -> None:
    assert [one.size for one in constructors(written(tmp_path, "leaf.py", source))] == count


@pytest.mark.parametrize("name", PARAMETERS)
def test_one_parameter_more_than_agreed_is_seen(name: str, tmp_path: Path) -> None:
    others = "".join(part(constructors, 1).replace("One", other) for other in PARAMETERS if other != name)
    of_size = [part(constructors, PARAMETERS[name] + more).replace("One", name) for more in (0, 1)]
    assert too_many_parameters(written(tmp_path, "leaf.py", others + of_size[0])) == []
    (told,) = too_many_parameters(written(tmp_path, "leaf.py", others + of_size[1]))
    assert told.endswith(f"{name}: at most {PARAMETERS[name]}")
    assert too_many_parameters(written(tmp_path, "leaf.py", others)) == [f"no class {name}"]


def test_places_and_arrows_are_counted(tmp_path: Path) -> None:
    written(tmp_path, "errors.py", "")
    written(tmp_path, "__init__.py", "")
    written(tmp_path, "__main__.py", "from tproxy_relay.cli import main\n")
    written(tmp_path, "cli/main.py", "from tproxy_relay import errors, net\nfrom tproxy_relay.net import a, b\n")
    written(tmp_path, "net/a.py", "from tproxy_relay.net import b\n")
    written(tmp_path, "net/b.py", "")
    assert places(tmp_path) == {"__init__", "__main__", "cli", "errors", "net"}
    assert arrows(tmp_path) == {("cli", "net")}
