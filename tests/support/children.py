"""Python in a process of its own, for what must not be done to the process that runs the tests."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import tproxy_relay

ROOT = Path(tproxy_relay.__file__).parents[1]
HERE = Path(__file__).parent

WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")
"""For root: the same account with nothing left. Anybody else has nothing anyway."""

NETWORK = ("unshare", "-Urn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
"""A network of our own, in which we may do everything, without any right outside it."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a child that finds the package and these helpers."""
    path = os.pathsep.join((str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])))
    # An ordinary user's PATH has no sbin on Debian, and ip and nft live there.
    programs = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin"
    return {**os.environ, "PATH": programs, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def no_capabilities() -> tuple[str, ...]:
    """The prefix that makes a command run without any capability."""
    return WITHOUT_CAPABILITIES if os.geteuid() == 0 else ()


def need(command: Sequence[str], require_or_skip: Callable[[str], NoReturn]) -> tuple[str, ...]:
    """`command` as a prefix, once it is known to work here."""
    if shutil.which(command[0]) is None:
        require_or_skip(f"{command[0]} is not installed")
    tried = subprocess.run(
        [*command, "true"], capture_output=True, text=True, timeout=20, check=False, env=environment()
    )
    if tried.returncode:
        require_or_skip(f"{' '.join(command)}: {tried.stderr.strip()}")
    return tuple(command)


def traced(call: str, number: str, calls: str, require_or_skip: Callable[[str], NoReturn]) -> tuple[str, ...]:
    """A prefix under which the kernel seems to refuse a call."""
    if shutil.which("strace") is None:
        require_or_skip("strace is not installed")
    trace = ("strace", "-f", "-qq", "-o", "/dev/null", f"-e{calls}", f"-einject={call}:error={number}")
    return need(trace, require_or_skip)


def run_python(
    code: str, *arguments: str, prefix: Sequence[str] = (), seconds: float = 20, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `code` to its end."""
    return subprocess.run(
        [*prefix, sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=seconds,
        env=env or environment(),
        check=False,
    )


@contextmanager
def running_python(
    code: str, *arguments: str, prefix: Sequence[str] = (), stderr: int | None = subprocess.PIPE
) -> Iterator["subprocess.Popen[str]"]:
    """Run `code` beside us; its whole process group is killed at the end."""
    child = subprocess.Popen(
        [*prefix, sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    try:
        yield child
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended
        child.wait(10)
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()
