"""A host of the lab as a machine with init scripts: /etc, /run and /var/log are its own.

The files are in `root`, where a test reads and writes them; `root / "etc/init.d"` is /etc/init.d in there.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from deadlines import wait_until
from machine import NAME, Machine

import tproxy_relay
from tproxy_relay.lab import Host

PROJECT = Path(tproxy_relay.__file__).resolve().parents[1]

_PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, {project!r})
from tproxy_relay.cli.main import main
sys.exit(main())
"""
"""What pip and a package install, but for this checkout."""

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


class InitHost(Machine):
    """In a `with`. The service is installed and stopped."""

    def __init__(self, host: Host, folder: Path, config: str) -> None:
        super().__init__(host, _MOUNTS, folder, sys.executable)
        self.root = folder
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

    def left(self) -> list[str]:
        """Everything that the service has in /run, and the processes."""
        folder = self.root / "run" / NAME
        files = [path.name for path in folder.iterdir()] if folder.exists() else []
        return [*files, *self.processes().values()]


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
        assert process.stdout is not None
        try:
            pid = int(process.stdout.readline())
            yield pid
            assert machine.processes().get(pid) == name, "it was killed"
            # Its first signal is this one.
            machine.kill("-USR1", pid)
            assert process.stdout.readline() == b"got 10\n"
        finally:
            process.kill()


def gone(machine: Machine, pid: int) -> None:
    """Wait for its end."""
    wait_until(lambda: pid not in machine.processes(), f"process {pid} has ended")
