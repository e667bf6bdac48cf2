"""How many connections fit into the descriptors, and into the memory."""

import logging
import os
from pathlib import Path

import pytest

from tproxy_relay.system import cgroup, limits

PLENTY = 1 << 50
"""Bytes of memory."""


@pytest.mark.parametrize("workers", [1, 4])
def test_as_many_as_the_descriptors_of_all_workers_allow(workers: int) -> None:
    for descriptors in (1000, 20_000):
        most, room = limits.of_relay(None, descriptors, 4, workers, PLENTY)
        assert most == workers * room
        used = room * limits.DESCRIPTORS_EACH + limits.RESERVED_DESCRIPTORS + 4
        assert descriptors - 4 <= used <= descriptors


def test_each_listener_takes_a_descriptor_of_each_worker() -> None:
    assert limits.of_relay(None, 1000, 2, 1, PLENTY).room - limits.of_relay(None, 1000, 42, 1, PLENTY).room == 20


def test_fewer_when_fewer_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    """Any worker may hold all of them, if the others have none."""
    most, room = limits.of_relay(7, 1000, 4, 4, PLENTY)
    assert most == 7
    assert room == limits.of_relay(None, 1000, 4, 4, PLENTY).room
    assert not caplog.records


def test_more_than_one_worker_can_hold_are_held_by_several(caplog: pytest.LogCaptureFixture) -> None:
    room = limits.of_relay(None, 1000, 4, 4, PLENTY).room
    assert limits.of_relay(2 * room, 1000, 4, 4, PLENTY) == (2 * room, room)
    assert not caplog.records


def test_never_more_than_there_is_room_for(caplog: pytest.LogCaptureFixture) -> None:
    possible = limits.of_relay(None, 1000, 4, 2, PLENTY)
    assert limits.of_relay(5000, 1000, 4, 2, PLENTY) == possible
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    said = {name: vars(warning)[name] for name in ("wanted", "possible", "descriptors", "workers")}
    assert said == {"wanted": 5000, "possible": possible.most, "descriptors": 1000, "workers": 2}


@pytest.mark.parametrize("descriptors", [0, 3, 20])
def test_one_is_always_tried(descriptors: int) -> None:
    assert limits.of_relay(None, descriptors, 4, 1, PLENTY) == (1, 1)


# --- memory


def test_auto_is_no_more_than_the_memory_is_enough_for(caplog: pytest.LogCaptureFixture) -> None:
    most, room = limits.of_relay(None, 20_000, 4, 2, 100 * limits.MEMORY_EACH)
    assert most == 100
    assert room == limits.of_relay(None, 20_000, 4, 2, PLENTY).room
    assert not caplog.records


def test_what_is_wanted_is_given_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert limits.of_relay(101, 20_000, 4, 2, 100 * limits.MEMORY_EACH).most == 101
    (warning,) = caplog.records
    assert warning.getMessage() == "max-connections is more than the memory is enough for"
    assert (vars(warning)["wanted"], vars(warning)["enough_for"]) == (101, 100)
    assert limits.of_relay(100, 20_000, 4, 2, 100 * limits.MEMORY_EACH).most == 100
    assert len(caplog.records) == 1


def test_the_memory_of_this_host() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < limits.usable_memory() <= limits.MEMORY_SHARE * total
    assert os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("line, folder", [("0::/a/b", "a"), ("5:cpu,memory:/a/b", "memory/a"), ("0::/a/b", "a/b")])
def test_a_control_group_has_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, folder: str) -> None:
    own = tmp_path / "own"
    own.write_text(f"{line}\n1:name=systemd:/x\n")
    monkeypatch.setattr(cgroup, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroup, "OWN_CGROUP", own)
    before = limits.usable_memory()
    group = tmp_path / folder
    group.mkdir(parents=True)
    file = group / ("memory.limit_in_bytes" if "memory" in folder else "memory.max")
    file.write_text("max\n")
    assert limits.usable_memory() == before
    file.write_text("1048576\n")
    assert limits.usable_memory() == limits.MEMORY_SHARE * 1048576
