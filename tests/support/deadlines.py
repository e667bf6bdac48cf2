"""Waiting for something to happen: bounded, and never longer than it takes."""

import time
from collections.abc import Callable

PATIENCE = 20.0
"""Seconds. Far more than anything here takes, on a busy machine too; a wait that uses them up fails the test."""


def wait_until(happened: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Return as soon as `happened()` is true; AssertionError that names `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.002)
