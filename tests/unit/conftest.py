"""What the unit tests of the relay itself share."""

import os
import socket
import threading
from collections.abc import Iterator

import pytest
from deadlines import wait_until


def _descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which a thread or a descriptor is still there that was not there before."""
    threads, descriptors = set(threading.enumerate()), len(_descriptors())
    yield
    wait_until(
        lambda: set(threading.enumerate()) <= threads,
        f"threads end: {sorted(t.name for t in set(threading.enumerate()) - threads)}",
    )
    wait_until(lambda: len(_descriptors()) <= descriptors, "descriptors are closed")


@pytest.fixture(scope="session")
def ipv6_loopback() -> None:
    """For tests that need ::1, which some containers lack."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no IPv6 on loopback: {error}")
