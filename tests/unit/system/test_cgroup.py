"""Limits of control groups, in folders as the kernel has them: both versions, and the groups around our own."""

from pathlib import Path

import pytest

from tproxy_relay.system import cgroup


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(cgroup, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


def are_in(root: Path, *lines: str) -> None:
    """Our groups, as /proc/self/cgroup would have them."""
    (root.parent / "own").write_text("".join(f"{line}\n" for line in lines))


def limit(folder: Path, file: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(f"{text}\n")


def test_the_groups_around_ours_count_too_the_nearest_first(root: Path) -> None:
    are_in(root, "0::/a/b")
    limit(root / "a" / "b", "memory.max", "max")
    limit(root / "a", "memory.max", "1000")
    assert list(cgroup.texts("memory", "memory.max")) == ["max", "1000"]
    assert cgroup.least("memory", "memory.max") == 1000


def test_the_smallest_number_holds(root: Path) -> None:
    are_in(root, "0::/a/b")
    for folder, text in ((root / "a" / "b", "7000"), (root / "a", "30"), (root, "500")):
        limit(folder, "pids.max", text)
    assert cgroup.least("pids", "pids.max") == 30


def test_of_version_1_only_the_hierarchy_of_the_controller(root: Path) -> None:
    are_in(root, "4:cpu,cpuacct:/c", "3:memory:/m", "0::/u")
    limit(root / "memory" / "m", "limit", "40")
    limit(root / "cpu" / "c", "limit", "1")
    limit(root / "u", "limit", "50")
    assert list(cgroup.texts("memory", "limit")) == ["40", "50"]


def test_nothing_outside_the_hierarchy_is_read(root: Path) -> None:
    limit(root.parent, "pids.max", "1")
    are_in(root, "0::/a")
    assert list(cgroup.texts("pids", "pids.max")) == []


def test_without_a_limit_or_without_proc_there_is_none(root: Path) -> None:
    assert cgroup.least("pids", "pids.max") is None
    are_in(root, "0::/")
    limit(root, "pids.max", "max")
    assert cgroup.least("pids", "pids.max") is None
