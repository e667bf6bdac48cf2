"""What every test may use: the network lab, and what to do where this machine cannot have one."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from tproxy_relay.lab import Lab, LabError

REPORT_PART = 6_000
"""Characters of a lab's report that are shown of its beginning, and of its end."""


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
