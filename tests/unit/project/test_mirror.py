"""The unit tests stand where the modules do: `tests/unit/FOLDER/test_MODULE.py` for each module of the package.

What hypothesis says of a module may have a file of its own, `test_MODULE_properties.py`. The tests of a `__main__` are
in `test_main.py`. The `__init__` of a folder needs none, and may have `FOLDER/test_FOLDER.py`. tests/unit/project is of
no module.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from package_source import PACKAGE, sources

UNIT = Path(__file__).parents[1]

EXCEPTIONS: dict[str, str] = {}
"""Modules without a test file of their own, and why: {"net/leaf.py": "tests/e2e/test_leaves.py shows all of it"}."""
LENGTH = 0
"""Of that list. It only shrinks, and this is lowered along with it."""
MAX_LENGTH = 15


def wanted(package: Path) -> dict[str, str]:
    """The modules of the package, and the test file that each is to have."""
    names = [path.relative_to(package) for path in sources(package) if path.stem != "__init__"]
    return {str(name): str(name.with_name(f"test_{name.stem.strip('_')}.py")) for name in names}


def present(unit: Path) -> list[str]:
    """The test files that there are."""
    names = [path.relative_to(unit) for path in sorted(unit.rglob("test_*.py"))]
    return [str(name) for name in names if name.parts[0] != "project"]


def without_tests(package: Path, unit: Path, exceptions: Iterable[str]) -> list[str]:
    """Each module whose test file is missing, and how that would be called."""
    done = {*present(unit)}
    return [f"{name}: {test}" for name, test in wanted(package).items() if test not in done and name not in exceptions]


def without_module(package: Path, unit: Path) -> list[str]:
    """The test files that are called like no module."""
    folders = [path.parent.name for path in sources(package) if path.name == "__init__.py" and path.parent != package]
    known = {*wanted(package).values(), *(f"{folder}/test_{folder}.py" for folder in folders)}
    return [test for test in present(unit) if test.replace("_properties.py", ".py") not in known]


def settled(package: Path, unit: Path, exceptions: Iterable[str]) -> list[str]:
    """The exceptions that need to be none: they have a test file by now, or are no modules any more."""
    tests, done = wanted(package), present(unit)
    return [name for name in exceptions if name not in tests or tests[name] in done]


def test_each_module_has_a_test_file_of_its_name() -> None:
    missing = without_tests(PACKAGE, UNIT, EXCEPTIONS)
    assert not missing, f"{len(missing)} in tests/unit:\n" + "\n".join(missing)


def test_each_test_file_has_the_name_of_a_module() -> None:
    assert not (strays := without_module(PACKAGE, UNIT)), "\n".join(strays)


def test_no_two_modules_want_the_same_test_file() -> None:
    assert not [test for test, count in Counter(wanted(PACKAGE).values()).items() if count > 1]


def test_the_list_of_exceptions_only_shrinks() -> None:
    assert all(EXCEPTIONS.values()), "each has a reason"
    assert not (over := settled(PACKAGE, UNIT, EXCEPTIONS)), f"take them out of the list, and lower LENGTH: {over}"
    assert len(EXCEPTIONS) <= LENGTH, "write the tests; the list does not grow"
    assert len(EXCEPTIONS) == LENGTH, f"the list is shorter now: LENGTH = {len(EXCEPTIONS)}"
    assert LENGTH <= MAX_LENGTH


# --- does the guard bark?


def test_it_sees_what_is_missing_and_what_is_left_over(tmp_path: Path) -> None:
    package, unit = tmp_path / "package", tmp_path / "unit"
    for name in ("__init__.py", "__main__.py", "errors.py", "net/__init__.py", "net/leaf.py", "net/__main__.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    tests = ("test_main.py", "test_errors.py", "test_errors_properties.py", "net/test_net.py", "net/test_gone.py")
    for name in (*tests, "project/test_docs.py", "conftest.py", "net/helper.py"):
        (unit / name).parent.mkdir(parents=True, exist_ok=True)
        (unit / name).touch()
    assert without_module(package, unit) == ["net/test_gone.py"]
    assert without_tests(package, unit, ()) == ["net/__main__.py: net/test_main.py", "net/leaf.py: net/test_leaf.py"]
    assert without_tests(package, unit, ["net/leaf.py"]) == ["net/__main__.py: net/test_main.py"]
    assert settled(package, unit, ["net/leaf.py"]) == []
    assert settled(package, unit, ["errors.py", "net/leaf.py", "net/gone.py"]) == ["errors.py", "net/gone.py"]
