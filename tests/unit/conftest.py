"""What the unit tests of the relay itself share."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import networks
import pytest
from deadlines import wait_until
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from tproxy_relay.intercept import programs

# A machine that is busy is no reason to fail, and what CI tries must be the same at every run.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
hypothesis_settings.register_profile("home", **_PATIENT)
hypothesis_settings.register_profile("repeatable", derandomize=True, database=None, **_PATIENT)
hypothesis_settings.load_profile("repeatable" if os.environ.get("CI") else "home")


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
def network(require_or_skip: Callable[[str], NoReturn]) -> None:
    """The test runs in a network of its own, see networks.py."""
    reason = networks.why_not()
    if reason:
        require_or_skip(reason.splitlines()[-1])


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Where the fixture `network` is asked for."""
    if "network" not in pyfuncitem.fixturenames:
        return None
    networks.run_test(pyfuncitem)
    return True


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


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """only(nft='exit 1', ...): these programs are on this host, as shell scripts, and no others."""

    def install(**scripts: str) -> None:
        for name, script in scripts.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setattr(programs, "search_path", lambda: str(tmp_path))

    return install
