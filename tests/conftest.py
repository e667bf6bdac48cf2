"""What every test may use: the network lab, what to do where this machine cannot have one, rows of the fault table.

And what every test must obey: it leaves nothing behind.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

# Asserts of what tests share are to tell as much as their own, and to be there under `python -O`, too.
pytest.register_assert_rewrite(*(path.stem for path in Path(__file__).parent.rglob("*.py") if path.stem != "conftest"))

import leaks  # noqa: E402
import rows  # noqa: E402

from tproxy_relay.lab import Lab, LabError  # noqa: E402

REPORT_PART = 6_000
"""Characters of a lab's report that are shown of its beginning, and of its end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the rows of the fault table go."""
    parser.addoption(
        "--rows", metavar="FILE", type=Path, help="write the rows of the fault table that were shown, as JSON"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that gathers the reports writes."""
    path = config.getoption("rows")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(rows.Table(path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before anything can fail."""
    rows.note(item)


@pytest.fixture(scope="session", autouse=True)
def own_host() -> Iterator[leaks.Host]:
    """Where the tests run."""
    with contextlib.closing(leaks.Host()) as here:
        yield here


@pytest.fixture(autouse=True)
def leaves_nothing_behind(own_host: leaks.Host) -> Iterator[None]:
    """Fails a test after which a thread, a descriptor, a child process, a namespace or a rule is there that was not
    there before. Fixtures of a wider scope come before it and go after it, so a lab of a module may stay."""
    before = own_host.look()
    yield
    if left := own_host.left_since(before):
        pytest.fail("left behind: " + "; ".join(left), pytrace=False)


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> rows.Seen:
    """For the tests of a row: call it with what was seen."""
    return rows.Seen(request.node)


@pytest.fixture(scope="session")
def require_or_skip() -> Callable[[str], NoReturn]:
    """Call it with a reason when a privilege or a tool is missing: a skip at home, a failure under CI.

    A skipped test looks like a passed one in a long report, so where CI is set nothing may be skipped.
    """
    return _fail if os.environ.get("CI") else _skip


def _fail(reason: str) -> NoReturn:
    pytest.fail(f"cannot be tested here, and CI must test everything: {reason}", pytrace=False)


def _skip(reason: str) -> NoReturn:
    pytest.skip(reason)


@pytest.fixture(scope="module")
def lab(require_or_skip: Callable[[str], NoReturn]) -> Iterator[Lab]:
    """Client, relay and server, built once for the tests of a module; each takes its relay and rules away."""
    yield from _built(require_or_skip)


@pytest.fixture
def fresh_lab(require_or_skip: Callable[[str], NoReturn]) -> Iterator[Lab]:
    """The same for one test alone, whose ports in TIME_WAIT or whose mounts would be in others' way."""
    yield from _built(require_or_skip)


def _built(require_or_skip: Callable[[str], NoReturn]) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        try:
            built = stack.enter_context(Lab())
        except LabError as error:
            require_or_skip(str(error))
        yield built


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> Any:
    """After a failure, show the rules, the sockets and the log of the relay."""
    report = yield
    if report.failed and call.when != "teardown":  # then it is gone
        for lab in getattr(item, "funcargs", {}).values():
            if isinstance(lab, Lab):
                report.sections.append(("network lab", _shortened(lab.report())))
    return report


def _shortened(text: str) -> str:
    """Without its middle, when thousands of connections are in it."""
    return text if len(text) <= 2 * REPORT_PART else f"{text[:REPORT_PART]}\n[...]\n{text[-REPORT_PART:]}"
