"""A host of the lab as a machine with init scripts: /etc, /run and /var/log are its own, and so are its process ids, so
that whatever a script leaves behind ends with it.

The files are in `folder`, where a test reads and writes them; `root / "etc/init.d"` is /etc/init.d in there.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from flows import wait_until

import tproxy_relay
from tproxy_relay.intercept import programs
from tproxy_relay.lab import Host, LabError

PROJECT = Path(tproxy_relay.__file__).resolve().parents[1]
NAME = "tproxy-relay"
SCRIPT = f"/etc/init.d/{NAME}"
LIMIT = 90.0
"""Seconds for one command; then it hangs."""

_PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, {project!r})
from tproxy_relay.cli import main
sys.exit(main())
"""
"""What pip and a package install, but for this checkout."""

_FIRST_PROCESS = """\
import signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans are reaped at once, as by an init
print("up", flush=True)
sys.stdin.read()
"""

_MOUNTS = """\
set -e
cd "$1"
shift
mount --make-rprivate /
mount --rbind /etc host-etc
mount --bind etc /etc
mount --bind run /run
mount --bind log /var/log
exec "$@"
"""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    said: str
    """On stdout and stderr."""
    seconds: float


class InitHost:
    """In a `with`. The service is installed and stopped."""

    def __init__(self, host: Host, folder: Path, config: str) -> None:
        self._host = host
        self.root = folder
        self._first: subprocess.Popen[bytes] | None = None
        for name in ("host-etc", "run", "log", "sbin"):
            (folder / name).mkdir()
        self._furnish_etc(folder / "etc")
        self.daemon = folder / "sbin" / NAME
        self.daemon.write_text(_PROGRAM.format(python=sys.executable, project=str(PROJECT)))
        self.daemon.chmod(0o755)
        self.config = folder / "etc" / f"{NAME}.conf"
        self.config.write_text(config)
        self.defaults = folder / "etc/default" / NAME
        self.set_defaults()

    def _furnish_etc(self, etc: Path) -> None:
        """Everything that is in /etc, but without services."""
        own = ("init.d", "default", f"{NAME}.conf")
        etc.mkdir()
        for name in os.listdir("/etc"):
            if name not in own:
                (etc / name).symlink_to(self.root / "host-etc" / name)
        for name in ("init.d", "default"):
            (etc / name).mkdir()
        shutil.copy2(PROJECT / "etc/init.d" / NAME, etc / "init.d" / NAME)

    def set_defaults(self, more: str = "") -> None:
        """The shipped /etc/default/tproxy-relay, where the program is here, and these lines."""
        shipped = (PROJECT / "etc/default" / NAME).read_text()
        self.defaults.write_text(f"{shipped}\nDAEMON={self.daemon}\n{more}\n")

    def __enter__(self) -> "InitHost":
        first = [sys.executable, "-I", "-S", "-c", _FIRST_PROCESS]
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = [*own, "sh", "-c", _MOUNTS, "sh", str(self.root), *first]
        pipe = subprocess.PIPE
        self._first = self._host.start(command, stdin=pipe, stdout=pipe, stderr=pipe)
        said = _pipe(self._first.stdout).readline()
        if said != b"up\n":
            why = _pipe(self._first.stderr).read().decode(errors="replace").strip()
            self.__exit__()
            raise LabError(f"cannot make a host with an /etc of its own: {why}")
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

    # --- commands

    def _inside(self, argv: Sequence[str]) -> list[str]:
        assert self._first is not None
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        return ["nsenter", "-t", children[0], "-m", "-p", "--", *argv]

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

    def do(self, verb: str, *, service: bool = False) -> Done:
        """What the init script does on this verb."""
        return self.run(*(("service", NAME) if service else (SCRIPT,)), verb)

    def must(self, verb: str) -> Done:
        """The same, and it succeeds."""
        done = self.do(verb)
        assert done.code == 0, (verb, done)
        return done

    # --- what is there

    @property
    def pidfile(self) -> Path:
        return self.root / "run" / NAME / f"{NAME}.pid"

    @property
    def pid(self) -> int:
        """Of the relay, as the processes in here count."""
        return int(self.pidfile.read_text())

    @property
    def log(self) -> str:
        """Of the relay."""
        path = self.root / "log" / NAME / "relay.log"
        return path.read_text() if path.exists() else ""

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

    def left(self) -> list[str]:
        """Everything that the service has in /run, and the processes."""
        folder = self.root / "run" / NAME
        files = [path.name for path in folder.iterdir()] if folder.exists() else []
        return [*files, *self.processes().values()]

    def kill(self, number: str, pid: int) -> None:
        """Send it a signal."""
        done = self.run("kill", number, str(pid))
        assert done.code == 0, done


@contextlib.contextmanager
def stranger(machine: InitHost, name: str = "stranger") -> Iterator[int]:
    """A process that has nothing to do with the relay, and at the end was sent no signal. Its number."""
    program = machine.root / "sbin" / f"{name}.py"
    program.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, signal, sys\n"
        "caught = set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, caught)\n"
        f"open('/proc/self/comm', 'w').write({name!r})\n"
        "print(os.getpid(), flush=True)\n"
        "got = signal.sigwait(caught)\n"
        "print('got', int(got), flush=True)\n"
    )
    program.chmod(0o755)
    with machine.start(str(program)) as process:
        try:
            pid = int(_pipe(process.stdout).readline())
            yield pid
            assert machine.processes().get(pid) == name, "it was killed"
            # Its first signal is this one.
            machine.kill("-USR1", pid)
            assert _pipe(process.stdout).readline() == b"got 10\n"
        finally:
            process.kill()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def gone(machine: InitHost, pid: int) -> None:
    """Wait for its end."""
    wait_until(lambda: pid not in machine.processes(), f"process {pid} has ended")
