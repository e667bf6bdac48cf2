"""The package as it is written: its files, and who imports whom, read with ast. Nothing is imported to be judged.

What is asked takes a folder, so that a test can show with a small package of its own that it would notice.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "tproxy_relay"
NAME = PACKAGE.name


class Import(NamedTuple):
    """One import of something of the package: where it stands, and the modules, dotted and without the package's name.
    The `early` ones are done when the importer is imported, not later in a function, and not for types alone."""

    path: Path
    line: int
    importer: str
    imported: str
    early: bool

    @property
    def where(self) -> str:
        """FILE:LINE."""
        return f"{self.path}:{self.line}"


def sources(package: Path) -> list[Path]:
    """Each file of it."""
    return sorted(package.rglob("*.py"))


def module_of(path: Path, package: Path) -> str:
    """`worker.acceptor`; `worker` for its __init__, and `__init__` for the package's own."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])


def place_of(module: str) -> str:
    """The folder, or the module at the top, that this one belongs to. `python -m tproxy_relay` is the command, so
    `__main__` belongs to `cli`."""
    place = module.partition(".")[0]
    return "cli" if place == "__main__" else place


def tree_of(path: Path) -> ast.Module:
    """Its syntax."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> Iterator[tuple[int, str, str, bool]]:
    """Line, absolute module, imported name ("" for a whole module) and whether it is early, wherever they stand."""
    tree = tree_of(path)
    early = {id(node) for node in _early(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, "", id(node) in early
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full, from {NAME}"
            for alias in node.names:
                yield node.lineno, node.module or "", alias.name, id(node) in early


def _early(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from _early(child)


def package_imports(path: Path, package: Path) -> Iterator[Import]:
    """Of the package's own modules in one file of it."""
    for line, dotted, name, early in imports(path):
        root, *below = dotted.split(".")
        if root == NAME:
            inner = package.joinpath(*below, name)
            if name and (inner.is_dir() or inner.with_suffix(".py").is_file()):
                below.append(name)
            yield Import(
                path.relative_to(package.parent), line, module_of(path, package), ".".join(below) or "__init__", early
            )


def all_imports(package: Path) -> list[Import]:
    """Of the package's own modules, in all files."""
    return [one for path in sources(package) for one in package_imports(path, package)]


def foreign_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level name of each import that is neither Python's own nor the package's."""
    for line, module, _, _ in imports(path):
        root = module.partition(".")[0]
        if root != NAME and root not in sys.stdlib_module_names:
            yield line, root
