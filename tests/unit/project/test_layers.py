"""The shape of the package: who may import whom, and what nobody may use.

When a test here is red, the import is wrong, or the table below is. Changing the table is a decision about the design.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from package_source import (
    PACKAGE,
    all_imports,
    foreign_imports,
    imports,
    module_of,
    package_imports,
    place_of,
    sources,
    tree_of,
)

# From the top down. A folder, or a module at the top of the package, may import from any row below its own, and from
# no other. `__main__` belongs to `cli`.
LAYERS = (
    ("cli",),
    ("demo", "supervisor"),
    ("check", "guard", "lab", "worker"),
    ("admin", "intercept", "relay"),
    ("config", "net"),
    ("ipc", "logs", "session_query", "system"),
    ("errors", "outcome", "settings"),
    ("__init__",),
)

# Stricter than the rows: settings are read without knowing the relay that obeys them, and the lab sees the relay from
# outside, as a process.
NARROW = {
    "config": {"errors", "session_query", "settings", "__init__"},
    "lab": {"errors", "intercept", "net", "settings", "__init__"},
}

# The only ones that may import it: everybody else is given settings, and does not ask where they come from.
IMPORTERS = {
    "config": {"check", "cli"},
}

# The only packages that are not Python's own, and the only places that may know them.
THIRD_PARTY = {
    "configargparse": "config/",
    "prometheus_client": "admin/metrics.py",
    "pythonjsonlogger": "logs/",
}

# The relay is threads and plain system calls; nothing of it goes through a shell.
FORBIDDEN_MODULES = {"asyncio", "ctypes"}
FORBIDDEN_NAMES = {
    "importlib": {"import_module"},
    "os": {"popen", "sendfile", "splice", "system"},
    "subprocess": {"getoutput", "getstatusoutput"},
}
FORBIDDEN_METHODS = {"sendfile"}


def wrong_directions(package: Path) -> list[str]:
    """Each import that does not point to a row below: file, line and direction."""
    row = {place: number for number, places in enumerate(LAYERS) for place in places}
    found = []
    for one in all_imports(package):
        upper, lower = place_of(one.importer), place_of(one.imported)
        if upper != lower and row.get(lower, -1) <= row.get(upper, len(LAYERS)):
            way = "sideways" if row.get(lower) == row.get(upper) else "upwards"
            found.append(f"{one.where}: {one.importer} -> {one.imported} points {way}, from {upper} to {lower}")
    return found


def broken_narrows(package: Path) -> list[str]:
    """Each import that a row allows, and NARROW or IMPORTERS does not: file, line and direction."""
    found = []
    for one in all_imports(package):
        upper, lower = place_of(one.importer), place_of(one.imported)
        if upper != lower and lower not in NARROW.get(upper, {lower}):
            found.append(f"{one.where}: {one.importer} -> {one.imported}: not for {upper}, see NARROW")
        elif upper != lower and upper not in IMPORTERS.get(lower, {upper}):
            found.append(f"{one.where}: {one.importer} -> {one.imported}: not for {upper}, see IMPORTERS")
    return found


def circle(package: Path) -> list[str]:
    """A way from a module over what is imported along with it back to itself, import by import; empty if none."""
    early = {(one.importer, one.imported): one for one in all_imports(package) if one.early}
    graph: dict[str, set[str]] = {}
    for importer, imported in early:
        graph.setdefault(importer, set()).add(imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        way = error.args[1][::-1]  # it names what is imported before who imports it
        return [f"{early[pair].where}: {pair[0]} -> {pair[1]}" for pair in zip(way, way[1:])]
    return []


def test_imports_point_downwards() -> None:
    assert not (wrong := wrong_directions(PACKAGE)), "\n".join(wrong)


def test_narrow_places_stay_narrow() -> None:
    assert not (wrong := broken_narrows(PACKAGE)), "\n".join(wrong)


def test_no_modules_import_each_other() -> None:
    assert not (way := circle(PACKAGE)), "a circle:\n" + "\n".join(way)


def test_everything_has_its_place() -> None:
    placed = [place for row in LAYERS for place in row]
    assert len(placed) == len(set(placed)), "LAYERS names something twice"
    present = {place_of(module_of(path, PACKAGE)) for path in sources(PACKAGE)}
    homeless, gone = present - set(placed), set(placed) - present
    assert not homeless, f"place in LAYERS, each in the lowest row it can have: {', '.join(sorted(homeless))}"
    assert not gone, f"LAYERS names what does not exist: {', '.join(sorted(gone))}"


def test_third_party_packages_stay_in_their_places() -> None:
    wrong = [
        f"{path}:{line}: must not import {imported}"
        for path in sources(PACKAGE)
        for line, imported in foreign_imports(path)
        if not str(path.relative_to(PACKAGE)).startswith(THIRD_PARTY.get(imported, "nowhere"))
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_forbidden_is_used() -> None:
    wrong = [f"{path}:{line}: {what}" for path in sources(PACKAGE) for line, what in forbidden_uses(path)]
    assert not wrong, "\n".join(wrong)


def forbidden_uses(path: Path) -> Iterator[tuple[int, str]]:
    for line, module, name, _ in imports(path):
        if module.partition(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_NAMES.get(module, ()):
            yield line, f"import of {module} {name}".rstrip()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr in FORBIDDEN_METHODS or node.attr in FORBIDDEN_NAMES.get(owner, ()):
                yield node.lineno, f"{owner}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "shell" and not is_false(node.value):
            yield node.lineno, "shell=True"
        elif isinstance(node, ast.Name) and node.id == "__import__":
            yield node.lineno, "__import__"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


# --- does the guard bark?


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small one: a module in each place, which imports nothing."""
    for place in (place for row in LAYERS for place in row if place != "__init__"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "leaf.py").touch()
    (tmp_path / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    "source, imported",
    [
        ("import tproxy_relay.worker.leaf", "worker.leaf"),
        ("from tproxy_relay import worker", "worker"),
        ("from tproxy_relay.worker import leaf", "worker.leaf"),
        ("from tproxy_relay.worker.leaf import Worker", "worker.leaf"),
        ("from tproxy_relay.lab import Lab", "lab"),
        ("def late():\n    from tproxy_relay import worker as w", "worker"),
        ("from tproxy_relay import __version__", "__init__"),
        ("import tproxy_relay", "__init__"),
    ],
)
def test_the_reader_sees_every_form_of_import(package: Path, source: str, imported: str) -> None:
    (package / "net" / "leaf.py").write_text(source)
    assert [one.imported for one in package_imports(package / "net" / "leaf.py", package)] == [imported]


@pytest.mark.parametrize(
    "importer, imported, way",
    [
        ("relay", "worker", "upwards"),
        ("admin", "worker", "upwards"),
        ("admin", "supervisor", "upwards"),
        ("system", "net", "upwards"),
        ("errors", "cli", "upwards"),
        ("worker", "guard", "sideways"),
        ("guard", "worker", "sideways"),
        ("admin", "relay", "sideways"),
        ("lab", "worker", "sideways"),
    ],
)
def test_an_import_upwards_is_named(package: Path, importer: str, imported: str, way: str) -> None:
    (package / importer / "leaf.py").write_text(f"def late():\n    from tproxy_relay.{imported} import leaf\n")
    where = f"{package.name}/{importer}/leaf.py:2"
    told = f"{where}: {importer}.leaf -> {imported}.leaf points {way}, from {importer} to {imported}"
    assert wrong_directions(package) == [told]


def test_what_is_in_no_row_may_import_nothing_and_be_imported_by_nobody(package: Path) -> None:
    (package / "new.py").write_text("from tproxy_relay.errors import leaf\n")
    (package / "cli" / "leaf.py").write_text("from tproxy_relay import new\n")
    assert len(wrong_directions(package)) == 2


@pytest.mark.parametrize("importer, imported", [("lab", "relay"), ("config", "system"), ("relay", "config")])
def test_an_import_that_a_narrow_rule_forbids_is_named(package: Path, importer: str, imported: str) -> None:
    (package / importer / "leaf.py").write_text(f"from tproxy_relay.{imported} import leaf\n")
    assert wrong_directions(package) == []
    (told,) = broken_narrows(package)
    assert told.startswith(f"{package.name}/{importer}/leaf.py:1: {importer}.leaf -> {imported}.leaf: not for")


@pytest.mark.parametrize("importer, imported", [("cli", "config"), ("check", "config"), ("worker", "relay")])
def test_an_import_downwards_is_none_of_its_business(package: Path, importer: str, imported: str) -> None:
    (package / importer / "leaf.py").write_text(f"from tproxy_relay.{imported} import leaf\n")
    assert wrong_directions(package) == broken_narrows(package) == circle(package) == []


def test_a_circle_inside_a_folder_is_named(package: Path) -> None:
    for importer, imported in (("leaf", "stem"), ("stem", "root"), ("root", "leaf")):
        (package / "net" / f"{importer}.py").write_text(f"\nfrom tproxy_relay.net import {imported}\n")
    (package / "cli" / "leaf.py").write_text("from tproxy_relay.net import leaf\n")
    assert sorted(circle(package)) == [
        f"{package.name}/net/leaf.py:2: net.leaf -> net.stem",
        f"{package.name}/net/root.py:2: net.root -> net.leaf",
        f"{package.name}/net/stem.py:2: net.stem -> net.root",
    ]


@pytest.mark.parametrize(
    "late", ["def late():\n    ", "if TYPE_CHECKING:\n    ", "one = lambda: 1\nasync def late(): "]
)
def test_what_is_imported_later_makes_no_circle(package: Path, late: str) -> None:
    (package / "net" / "leaf.py").write_text("from tproxy_relay.net import stem\n")
    (package / "net" / "stem.py").write_text(f"{late}from tproxy_relay.net import leaf\n")
    assert circle(package) == []


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio.streams",
        "from ctypes import util",
        "from os import sendfile",
        "os.splice(a, b, 1)",
        "client.sendfile(page)",
        "os.system('ip rule')",
        "subprocess.run('ip rule', shell=True)",
        "subprocess.run('ip rule', shell=maybe)",
        "importlib.import_module('tproxy_relay.cli.main')",
        "__import__('asyncio')",
    ],
)
def test_the_reader_sees_what_is_forbidden(tmp_path: Path, source: str) -> None:
    (tmp_path / "leaf.py").write_text(source)
    assert len(list(forbidden_uses(tmp_path / "leaf.py"))) == 1


@pytest.mark.parametrize("source", ["subprocess.run(['ip'], shell=False)", "host.popen(['ip'])", "import os"])
def test_the_reader_does_not_bark_at_friends(tmp_path: Path, source: str) -> None:
    (tmp_path / "leaf.py").write_text(source)
    assert not list(forbidden_uses(tmp_path / "leaf.py"))
