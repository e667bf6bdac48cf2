"""The launcher of a worker, as the process that it is: what descriptors the next program finds, and what it is told."""

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence

import children
import pytest

from tproxy_relay.supervisor import launch

NUMBERED = """
import fcntl, os, sys
away, files = [], sys.argv[1].split(",") if sys.argv[1] else []
for name in files:  # each is a file of that name, out of the way of the others
    away.append(fcntl.fcntl(os.memfd_create(name), fcntl.F_DUPFD, 200))
os.closerange(3, 200)
for name, fd in zip(files, away):
    os.dup2(fd, int(name))  # inheritable
os.closerange(200, 400)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a program that has files at these descriptors; each is named after its number."""

REPORT = """
import json, os
fds = {}
for name in os.listdir("/proc/self/fd"):
    try:
        fds[name] = os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        pass  # the one that listed them
asked = {name: os.environ.get(name) for name in ("LISTEN_FDS", "LISTEN_PID", "GLIBC_TUNABLES", "KEPT")}
inheritable = all(map(os.get_inheritable, range(3, len(fds))))
print(json.dumps({"fds": fds, "pid": os.getpid(), "inheritable": inheritable, **asked}))
"""


def launched(
    descriptors: Sequence[int], *becoming: str, also: Sequence[int] = (), **environment: str
) -> subprocess.Popen[str]:
    """The launcher, given these descriptors of its parent (and others that it was not told of)."""
    numbers = ",".join(map(str, (*descriptors, *also)))
    command = [sys.executable, "-I", "-S", str(launch.__file__), ",".join(map(str, descriptors)), *becoming]
    return subprocess.Popen(
        [sys.executable, "-c", NUMBERED, numbers, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=children.environment(KEPT="yes", **environment),
    )


def report(descriptors: Sequence[int], *prefix: str, **environment: str) -> dict[str, object]:
    """What the next program finds."""
    child = launched(descriptors, *prefix, sys.executable, "-c", REPORT, **environment)
    out, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (0, "")
    said: dict[str, object] = json.loads(out)
    assert said["pid"] == child.pid, "it is still the same process"
    return said


ORDERS = [
    *(list(order) for order in itertools.permutations((3, 4, 5))),
    [4, 3, 6, 5],
    [5, 7, 3],
    [10, 9, 8, 7, 6, 5, 4, 3],
    [12, 40, 11],
    [4],
    [3],
    [],
]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_they_land_in_order_and_nothing_else_is_open(order: list[int]) -> None:
    said = report(order)
    fds = said["fds"]
    assert isinstance(fds, dict)
    for standard in "012":
        del fds[standard]
    assert fds == {str(3 + at): f"/memfd:{fd} (deleted)" for at, fd in enumerate(order)}
    assert said["inheritable"], "setpriv hands them on"
    assert (said["LISTEN_FDS"], said["LISTEN_PID"]) == (str(len(order)), str(said["pid"]))
    assert said["KEPT"] == "yes"


def test_small_stacks_are_asked_for_beside_what_the_operator_asks_for() -> None:
    assert report([3])["GLIBC_TUNABLES"] == launch.SMALL_STACKS
    said = report([3], GLIBC_TUNABLES="glibc.malloc.arena_max=1")
    assert said["GLIBC_TUNABLES"] == f"glibc.malloc.arena_max=1:{launch.SMALL_STACKS}"


def test_other_programs_in_between_keep_the_process() -> None:
    said = report([5, 3], "env", "sh", "-c", 'exec "$@"', "sh")
    assert said["LISTEN_PID"] == str(said["pid"])


def test_the_next_program_is_found_like_any_other_and_gets_its_arguments() -> None:
    child = launched([3], "sh", "-c", 'echo "$#" "$1" "$2"', "sh", "a b", "")
    assert child.communicate(timeout=20) == ("2 a b \n", "")


def test_it_says_so_if_there_is_no_such_program() -> None:
    child = launched([3], "no-such-program-anywhere")
    out, err = child.communicate(timeout=20)
    assert (child.returncode, out) == (1, "")
    assert "No such file or directory" in err.splitlines()[-1]


def test_it_obeys_nobody_s_environment() -> None:
    """It runs with the rights of the supervisor: no module and no option of a stranger is for it."""
    with open(str(launch.__file__), encoding="utf-8") as source:
        imported = [line for line in source if line.startswith(("import", "from"))]
    assert imported == ["import fcntl\n", "import os\n", "import sys\n"]
