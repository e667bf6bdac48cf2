"""The shape of the package: who may import whom, and what nobody may use.

Read from the source with ast, so a module need not be importable to be judged. When a test here is red, the
import is wrong, or the table below is. Changing the table is a decision about the design.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[3] / "tproxy_relay"

# From the top down. A module may import from any row below its own, and from no other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("supervisor",),
    ("admin", "demo"),
    ("check", "guard", "lab", "worker"),
    ("intercept", "relay"),
    ("config", "net"),
    ("ipc", "logs", "session_query", "system"),
    ("errors", "outcome", "settings"),
    ("__init__",),
)

# Stricter than the layers: settings are read without knowing the relay that obeys them, and the lab sees the
# relay from outside, as a process.
CONFIGURATION = {
    "config",
}
NARROW = {
    "lab": {"net", "errors", "intercept", "settings", "__init__"},
    **dict.fromkeys(CONFIGURATION, CONFIGURATION | {"errors", "session_query", "settings", "__init__"}),
}

# The only packages that are not Python's own, and the only modules that may know them.
THIRD_PARTY = {
    "configargparse": {"config"},
    "prometheus_client": {"admin"},
    "pythonjsonlogger": {"logs"},
}

# The relay is threads and plain system calls; nothing of it goes through a shell.
FORBIDDEN_MODULES = {"asyncio", "ctypes"}
FORBIDDEN_NAMES = {
    "importlib": {"import_module"},
    "os": {"popen", "sendfile", "splice", "system"},
    "subprocess": {"getoutput", "getstatusoutput"},
}
FORBIDDEN_METHODS = {"sendfile"}


def test_imports_point_downwards() -> None:
    depth = {module: row for row, modules in enumerate(LAYERS) for module in modules}
    bottom = len(LAYERS)
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {importer} must not import {imported}: not in a row below"
        for path, importer in modules_in(PACKAGE)
        for line, imported in package_imports(path, PACKAGE)
        if importer != imported and depth.get(imported, bottom) <= depth.get(importer, -1)
    ]
    assert not wrong, "\n".join(wrong)


def test_narrow_modules_stay_narrow() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {importer} must not import {imported}: see NARROW"
        for path, importer in modules_in(PACKAGE)
        for line, imported in package_imports(path, PACKAGE)
        if importer in NARROW and imported not in NARROW[importer] | {importer}
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_place() -> None:
    placed = [module for row in LAYERS for module in row]
    assert len(placed) == len(set(placed)), "LAYERS names a module twice"
    present = {module for _, module in modules_in(PACKAGE)}
    homeless, gone = present - set(placed), set(placed) - present
    assert not homeless, f"place in LAYERS, each in the lowest row it can have: {', '.join(sorted(homeless))}"
    assert not gone, f"LAYERS names what does not exist: {', '.join(sorted(gone))}"


def test_third_party_packages_stay_in_their_modules() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {module} must not import {imported}"
        for path, module in modules_in(PACKAGE)
        for line, imported in foreign_imports(path)
        if module not in THIRD_PARTY.get(imported, set())
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_forbidden_is_used() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path, _ in modules_in(PACKAGE)
        for line, what in forbidden_uses(path)
    ]
    assert not wrong, "\n".join(wrong)


# --- reading the source -------------------------------------------------------------------------------------


def modules_in(package: Path) -> list[tuple[Path, str]]:
    """Each source file with the name it has in LAYERS: the files of a sub-package share the sub-package's."""
    files = sorted(package.rglob("*.py"))
    return [(path, path.relative_to(package).parts[0].removesuffix(".py")) for path in files]


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line, absolute module and imported name ("" for a whole module), wherever in the file they stand."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full, from tproxy_relay"
            for alias in node.names:
                yield node.lineno, node.module or "", alias.name


def package_imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and LAYERS name of each import from the package itself."""
    for line, module, name in imports(path):
        root, *below = module.split(".")
        if root != "tproxy_relay":
            continue
        if below:
            yield line, below[0]
        elif (package / name).is_dir() or (package / f"{name}.py").is_file():
            yield line, name or "__init__"
        else:
            yield line, "__init__"


def foreign_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of each import that is neither Python's own nor the package's."""
    for line, module, _ in imports(path):
        root = module.partition(".")[0]
        if root != "tproxy_relay" and root not in sys.stdlib_module_names:
            yield line, root


def forbidden_uses(path: Path) -> Iterator[tuple[int, str]]:
    for line, module, name in imports(path):
        if module.partition(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_NAMES.get(module, ()):
            yield line, f"import of {module} {name}".rstrip()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
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


# --- does the guard bark? -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, imported",
    [
        ("import tproxy_relay.worker.worker", "worker"),
        ("from tproxy_relay import worker", "worker"),
        ("from tproxy_relay.worker.worker import Worker", "worker"),
        ("from tproxy_relay.lab.namespaces import Namespace", "lab"),
        ("def late():\n    from tproxy_relay import worker as w", "worker"),
        ("from tproxy_relay import __version__", "__init__"),
        ("import tproxy_relay", "__init__"),
    ],
)
def test_the_reader_sees_every_form_of_import(tmp_path: Path, source: str, imported: str) -> None:
    (tmp_path / "worker.py").touch()
    (tmp_path / "leaf.py").write_text(source)
    assert [name for _, name in package_imports(tmp_path / "leaf.py", tmp_path)] == [imported]


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
