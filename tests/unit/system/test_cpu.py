"""Where threads run is asked of the kernel, in processes and threads of the test's own."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import children
import pytest

from tproxy_relay.system import cgroup, cpu
from tproxy_relay.system.cpu import CpuPlacement

T = TypeVar("T")
ALL = os.sched_getaffinity(0)


def in_a_thread(do: Callable[[], T]) -> T:
    """So that nothing of it stays with the tests."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(do()))
    thread.start()
    thread.join()
    return results[0]


def test_those_that_it_may_use() -> None:
    """A container or a unit often gives it fewer than the host has."""
    ran = children.run_python(
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from tproxy_relay.system import cgroup, cpu as processors; print(processors.allowed(), processors.worth())"
    )
    assert ran.stdout == f"[{min(ALL)}] 1\n"
    assert cpu.allowed() == sorted(ALL)


def test_a_quota_of_the_cgroup_is_worth_fewer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smallest one on the way up counts; a part of a processor is one."""
    own, folder = tmp_path / "own", tmp_path / "system.slice" / "relay.service"
    folder.mkdir(parents=True)
    monkeypatch.setattr(cgroup, "CGROUPS", tmp_path)
    monkeypatch.setattr(cgroup, "OWN_CGROUP", own)
    monkeypatch.setattr(cpu, "allowed", lambda: list(range(64)))
    assert cpu.worth() == 64
    own.write_text("1:name=systemd:/x\n")
    assert cpu.worth() == 64, "of a controller that says nothing of time"
    own.write_text("1:name=systemd:/x\n0::/system.slice/relay.service\n")
    assert cpu.worth() == 64
    for text, worth in (
        ("max 100000", 64), ("50000 100000", 1), ("150000 100000", 2), ("6400000 50000", 64), ("nonsense", 64)
    ):  # fmt: skip
        (folder / "cpu.max").write_text(text + "\n")
        assert cpu.worth() == worth, text
    (folder.parent / "cpu.max").write_text("400000 100000")
    assert cpu.worth() == 4
    (folder / "cpu.max").write_text("100000 100000")
    assert cpu.worth() == 1


V1 = Path("/sys/fs/cgroup/cpu")
WORTH = """
import os, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as joined:
    joined.write(str(os.getpid()))
from tproxy_relay.system import cpu
cpu.allowed = lambda: list(range(64))
print(cpu.worth())
"""


@pytest.fixture
def v1_group(require_or_skip: Callable[[str], NoReturn]) -> Iterator[Path]:
    """A control group of version 1 with a group in it."""
    outer = V1 / f"tproxy-relay-test-{os.getpid()}"
    made: list[Path] = []
    try:
        for folder in (outer, outer / "inner"):
            folder.mkdir()
            made.append(folder)
    except OSError as error:
        if os.path.exists(V1 / "cpu.cfs_quota_us"):
            require_or_skip(f"no control group can be made: {error}")
        pytest.skip("this machine has version 2 only")
    else:
        yield outer / "inner"
    finally:
        for folder in reversed(made):
            folder.rmdir()


@pytest.mark.parametrize(
    ("inner", "outer", "worth"), [(-1, -1, 64), (150000, -1, 2), (-1, 300000, 3), (20000, 90000, 1)]
)
def test_a_quota_of_version_1(v1_group: Path, inner: int, outer: int, worth: int) -> None:
    """As the kernel has it; groups of version 1 have their quota in a file of its own."""
    (v1_group.parent / "cpu.cfs_quota_us").write_text(str(outer))
    (v1_group / "cpu.cfs_quota_us").write_text(str(inner))
    done = children.run_python(WORTH, str(v1_group))
    assert done.stdout.strip() == str(worth), done.stderr


@pytest.mark.parametrize(
    ("affinity", "workers", "cpus"),
    [
        ("auto", 1, ()), ("auto", 3, ()), ("auto", 4, (0, 1, 5, 9)), ("auto", 8, (0, 1, 5, 9)),
        ("on", 1, (0, 1, 5, 9)), ("off", 4, ()),
    ],
)  # fmt: skip
def test_which_cpus_the_workers_stay_on(
    monkeypatch: pytest.MonkeyPatch, affinity: str, workers: int, cpus: tuple[int, ...]
) -> None:
    monkeypatch.setattr(cpu, "allowed", lambda: [0, 1, 5, 9])
    assert cpu.cpus(affinity, workers) == cpus


def test_a_thread_stays_roams_and_stays() -> None:
    cpu = max(ALL)

    def wander() -> list[set[int]]:
        ours, seen = CpuPlacement(cpu), []
        for move in (ours.stay, ours.roam, ours.stay):
            move()
            seen.append(os.sched_getaffinity(0))
        return seen

    assert in_a_thread(wander) == [{cpu}, ALL, {cpu}]
    assert os.sched_getaffinity(0) == ALL


def test_one_without_a_cpu_stays_where_it_is() -> None:
    def wander() -> set[int]:
        os.sched_setaffinity(0, {min(ALL)})
        ours = CpuPlacement(None)
        ours.stay()
        os.sched_setaffinity(0, {max(ALL)})  # by the operator, with taskset
        ours.roam()
        return os.sched_getaffinity(0)

    assert in_a_thread(wander) == {max(ALL)}


def test_a_thread_waits_for_others_and_pushes_ahead() -> None:
    def wait() -> list[object]:
        ours = CpuPlacement(None)
        return [ours.wait_for_others(), os.sched_getscheduler(0), ours.push_ahead(), os.sched_getscheduler(0)]

    assert in_a_thread(wait) == [True, os.SCHED_BATCH, None, os.SCHED_OTHER]


def test_a_sandbox_may_forbid_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line, and no more tries."""
    tries = []

    def forbidden(*_: object) -> None:
        tries.append(1)
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", forbidden)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    ours = CpuPlacement(0)
    for _ in range(3):
        ours.stay()
        ours.roam()
        assert not ours.wait_for_others()
    assert [record.message for record in caplog.records] == ["a worker cannot stay on one processor"]
    assert len(tries) == 2
