"""`tproxy-relay run`: a foreground process from its first signal handler to its last log line.

The order is what matters here. Capabilities that nobody needs go first. Signals are caught before anything is there
that would need to be undone, because as PID 1 a process ignores those it has no handler for. Whatever can fail fails
before READY.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable, MutableMapping
from typing import NoReturn

from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import generation
from tproxy_relay.supervisor.supervisor import Supervisor
from tproxy_relay.system import privileges, proc_title, reaper
from tproxy_relay.system.terminal import Terminal
from tproxy_relay.system.wakeup import Wakeup

LOG_FLUSH = 1.0
"""Seconds that the log gets at the end."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def give_up_privileges(environ: MutableMapping[str, str]) -> None:
    """What a relay has no use for. This program may begin again, so do nothing before that should not be done twice.
    Raises SystemRefusedError without setpriv."""
    privileges.shed(environ)


def run(
    settings: Settings, reread: Callable[[], Settings], environ: MutableMapping[str, str], *, take_over: bool
) -> NoReturn:
    """Relay until told to stop; ends the process. `reread` is for a reload. With `take_over`, a relay that is there
    already hands over. Raises RelayError if it cannot begin."""
    proc_title.become(proc_title.SUPERVISOR)
    wakeup = Wakeup()
    terminal = Terminal(wakeup.notify)  # before HUP is caught
    wakeup.catch((*SIGNALS, *((signal.SIGCHLD,) if os.getpid() == 1 else ())))
    if os.getpid() == 1:
        reaper.reap_orphans(())  # of those that ended before, no signal will tell
    # sys.stderr is None when we were started without one, and descriptor 2 is somebody else's then.
    writer = LogWriter(settings, sys.stderr.fileno() if sys.stderr else None)
    writer.start()
    try:
        generation.warn_of_nonlocal_bind()
        supervisor = Supervisor(reread, environ, wakeup, writer, terminal)
        code = supervisor.run() if supervisor.start(settings, take_over=take_over) else 0
    except BaseException:
        writer.stop(LOG_FLUSH)
        warnings.simplefilter("ignore", ResourceWarning)  # the end of the process closes everything
        raise
    writer.stop(LOG_FLUSH)
    os._exit(code)  # the interpreter would wait for a log that nobody reads
