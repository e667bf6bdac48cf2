"""The terminal that this process was started from, and what a HUP means: that it is gone, or a wish to reload.

When a terminal is hung up (ssh dies, a window is closed), the kernel and the shell send HUP; some shells send one when
they exit. Programs that do not ask for it end of that. This one asks, because kill -HUP and service managers mean a
reload; so it has to see whether the terminal goes at the same time. Who was started by nohup(1) is to go on, and so
is who gets no HUP when the terminal goes: after `disown`, or in another session.
"""

import logging
import math
import os
import select
import signal
import time
from collections.abc import Callable

LOOK_INTERVAL = 1.0
"""Seconds between two looks at the terminal."""
HUP_DELAY = 2.0
"""Seconds between the end of a terminal and a HUP that is about it; milliseconds as a rule."""
GOING_DELAY = 0.3
"""Seconds that a terminal may still be there after the HUP that is about its end: zsh sends one to its jobs, saves its
history, and exits. The one who gets it waits for so long, and only then it is a wish to reload."""

log = logging.getLogger(__name__)


class Terminal:
    """The controlling terminal of this process, if there is one."""

    def __init__(self, notify: Callable[[signal.Signals], None]) -> None:
        """To be made before HUP is caught. `notify` is called with TERM when the process is to end."""
        self.deadline: float | None = None
        """When `tick` looks at it again (time.monotonic()); None: there is nothing to look at."""
        self._notify = notify
        self._has_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # which programs inherit
        self._fd = _open()
        self._gone_at = math.inf
        self._hup = False
        """One has come that is about its end."""
        self._ending = False
        if self._fd is not None:
            self.deadline = time.monotonic()

    def takes_hup(self) -> bool:
        """A HUP has come: True if it is about the terminal, and all that is to be done about it is done. With a
        terminal that stays there, this takes GOING_DELAY."""
        if self._fd is not None and self._gone_at == math.inf and not _is_hung_up(self._fd, GOING_DELAY):
            return False
        self._hup = True
        self.tick(time.monotonic())
        return self._ending or self._gone_at < math.inf and self._fd is not None

    def tick(self, now: float) -> None:
        """See whether it is still there; `now` is time.monotonic()."""
        if self._fd is None or self._ending:
            return
        if self._gone_at == math.inf and _is_hung_up(self._fd):
            self._gone_at = now
        if self._gone_at == math.inf:
            self.deadline = now + LOOK_INTERVAL
        elif not self._has_nohup and self._hup:
            self._end()
        elif now > self._gone_at + HUP_DELAY:
            self._let_go()
        else:
            self.deadline = self._gone_at + HUP_DELAY + 0.01

    def close(self) -> None:
        """Look at it no more."""
        self.deadline = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _end(self) -> None:
        log.warning("terminal gone, stopping")
        self._ending = True
        self.close()
        self._notify(signal.SIGTERM)

    def _let_go(self) -> None:
        log.info("terminal gone, going on")
        self.close()


def _open() -> int | None:
    """ENXIO: this process has no terminal (tty(4)). ENOENT, EACCES: nor is there one in this container."""
    try:
        return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None


def _is_hung_up(fd: int, seconds: float = 0.0) -> bool:
    """Or it is so within that time."""
    looks = select.poll()
    looks.register(fd, 0)  # what is always told: POLLERR and POLLHUP
    return bool(looks.poll(1000 * seconds))
