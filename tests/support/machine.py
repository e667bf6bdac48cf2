"""A host of the lab as a machine of its own: its mounts and its process ids are its own, and so are all the files that
its mounts replace. Whatever a service leaves behind ends with it.
"""

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from tproxy_relay.intercept import programs
from tproxy_relay.lab import Host, LabError

NAME = "tproxy-relay"
SCRIPT = f"/etc/init.d/{NAME}"
LIMIT = 90.0
"""Seconds for one command; then it hangs."""

_FIRST_PROCESS = """\
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are reaped at once, as by an init
print("up", flush=True)
sys.stdin.read()
"""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    said: str
    """On stdout and stderr."""
    seconds: float


class Machine:
    """In a `with`."""

    def __init__(self, host: Host, mounts: str, folder: Path, python: str) -> None:
        """The script `mounts` gets the folder as its first argument, and becomes the command that is the others."""
        self._host = host
        self._mounts = mounts
        self._folder = folder
        self._python = python
        self._first: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Machine":
        first = [self._python, "-I", "-S", "-c", _FIRST_PROCESS]
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*own, "sh", "-c", self._mounts, "sh", str(self._folder), *first]
        pipe = subprocess.PIPE
        self._first = self._host.start(command, stdin=pipe, stdout=pipe, stderr=pipe)
        said = _pipe(self._first.stdout).readline()
        if said != b"up\n":
            why = _pipe(self._first.stderr).read().decode(errors="replace").strip()
            self.__exit__()
            raise LabError(f"cannot make a machine of its own: {why}")
        return self

    def __exit__(self, *_: object) -> None:
        """With process 1 the kernel ends all others."""
        assert self._first is not None
        for pipe in (self._first.stdin, self._first.stdout, self._first.stderr):
            _pipe(pipe).close()
        try:
            self._first.wait(10)
        except subprocess.TimeoutExpired:
            self._first.kill()
            self._first.wait()

    @property
    def first(self) -> int:
        """Its process 1, as we count."""
        assert self._first is not None
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        return int(children[0])

    def run(self, *argv: str, env: Mapping[str, str] | None = None) -> Done:
        """To its end; `env` is all that it has in its environment."""
        began = time.monotonic()
        with self.start(*argv, env=env) as process:
            try:
                said, _ = process.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        return Done(process.returncode, said.decode(errors="replace"), time.monotonic() - began)

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
        """What it writes goes to its `stdout`."""
        given = {"PATH": programs.search_path()} if env is None else env
        whole = ["env", "-i", *(f"{name}={value}" for name, value in given.items()), *argv]
        return self._host.start(self._inside(whole), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def _inside(self, argv: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self.first), "-m", "-p", "-r", "--", *argv]

    def do(self, verb: str, *, service: bool = False) -> Done:
        """What the init script does on this verb."""
        return self.run(*(("service", NAME) if service else (SCRIPT,)), verb)

    def must(self, verb: str, *, service: bool = False) -> Done:
        """The same, and it succeeds."""
        done = self.do(verb, service=service)
        assert done.code == 0, (verb, done)
        return done

    def kill(self, number: str, pid: int) -> None:
        """Send it a signal."""
        done = self.run("kill", number, str(pid))
        assert done.code == 0, done

    def processes(self) -> dict[int, str]:
        """Number and name of all that run, but for process 1 and whoever looks."""
        return {pid: name for pid, _, name in self._listed()}

    def relays(self) -> list[int]:
        """The supervisors that run. What they start has their name until it becomes a program of its own."""
        named = {pid: parent for pid, parent, name in self._listed() if name == NAME}
        return [pid for pid, parent in named.items() if parent not in named]

    def _listed(self) -> list[tuple[int, int, str]]:
        lines = self.run("ps", "-e", "-o", "pid=,ppid=,comm=").said.splitlines()
        listed = [line.split(maxsplit=2) for line in lines]
        return [(int(pid), int(parent), name) for pid, parent, name in listed if pid != "1" and name != "ps"]


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
