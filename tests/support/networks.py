"""Tests that need a network of their own: each runs in a forked process, in a new network namespace, as its root.

A test asks for it with the fixture `network`; assertions and fixtures work in it as anywhere else.
"""

import ctypes
import os
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import pytest

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
"""linux/sched.h; os.unshare() is there from Python 3.12 on."""

SBIN = ":/usr/local/sbin:/usr/sbin:/sbin"
"""Where nft, ip and iptables are, and an ordinary user's PATH does not lead."""


LEGACY_IPTABLES = os.geteuid() == 0
"""In a user namespace they do not work: the kernel lets only the real root read /proc/net/ip_tables_names."""


def enter() -> None:
    """Leave the network of this process for a new one with nothing in it but lo. OSError if that is forbidden."""
    uid, gid = os.geteuid(), os.getegid()
    flags = _CLONE_NEWNET | (_CLONE_NEWUSER if uid else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    os.environ["PATH"] += SBIN
    # An ordinary user may not open the one in /run, and nobody else is in this network to be kept out.
    os.environ["XTABLES_LOCKFILE"] = f"/tmp/xtables.lock.{os.getpid()}"
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def why_not() -> str:
    """What keeps this user from having such networks; '' if nothing does."""
    return _in_child(enter)


def run_test(item: pytest.Function) -> None:
    """Run the test function in a child, and fail or skip as it does."""
    arguments = {name: item.funcargs[name] for name in item._fixtureinfo.argnames}
    said = _in_child(lambda: (enter(), item.obj(**arguments)))
    if said.startswith("SKIP"):
        pytest.skip(said.removeprefix("SKIP"))
    if said:
        pytest.fail(said, pytrace=False)


def _in_child(job: object) -> str:
    """'' if the job ends well in a process of its own, else the traceback, or SKIP and the reason."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on fork() beside faulthandler's thread
        pid = os.fork()
    if not pid:
        _child(job, writer)
    os.close(writer)
    try:
        with os.fdopen(reader) as answer:
            return answer.read()
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
        finally:
            os.waitpid(pid, 0)


def _child(job: object, writer: int) -> NoReturn:
    said = ""
    try:
        assert callable(job)
        job()
    except pytest.skip.Exception as skipped:
        said = f"SKIP{skipped}"
    except BaseException:
        said = traceback.format_exc()
    finally:
        sys.stdout.flush()
        lock = Path(os.environ.get("XTABLES_LOCKFILE", "/nonexistent"))
        lock.unlink(missing_ok=True)
        os.write(writer, said.encode()[-60_000:])
        os._exit(0)
