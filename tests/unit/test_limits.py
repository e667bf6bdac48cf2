"""How many connections fit into the descriptors."""

import logging
import os

import children
import pytest

from tproxy_relay import limits


def open_now() -> int:
    """Descriptors of this process, less the one that counts them."""
    return len(os.listdir("/proc/self/fd")) - 1


def test_as_many_as_the_descriptors_allow() -> None:
    for descriptors in (1000, 20_000):
        most = limits.max_connections(None, descriptors)
        used = most * limits.DESCRIPTORS_EACH + limits.RESERVED_DESCRIPTORS + open_now()
        assert descriptors - 4 <= used <= descriptors


def test_fewer_when_fewer_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    assert limits.max_connections(7, 1000) == 7
    assert not caplog.records


def test_never_more_than_there_is_room_for(caplog: pytest.LogCaptureFixture) -> None:
    possible = limits.max_connections(None, 1000)
    assert limits.max_connections(5000, 1000) == possible
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert (vars(warning)["wanted"], vars(warning)["possible"], vars(warning)["descriptors"]) == (5000, possible, 1000)


@pytest.mark.parametrize("descriptors", [0, 3, 20])
def test_one_is_always_tried(descriptors: int) -> None:
    assert limits.max_connections(None, descriptors) == 1


RAISE = """
import resource
from tproxy_relay import limits
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 300))
print(limits.raise_descriptor_limit(), resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def test_the_soft_limit_is_lifted_to_the_hard_one() -> None:
    assert children.run_python(RAISE).stdout == "300 (300, 300)\n"
