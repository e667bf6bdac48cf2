"""As PID 1 of a container: what other programs have left behind becomes our child, and is to be waited for."""

import os
from collections.abc import Container


def reap_orphans(own: Container[int]) -> None:
    """Wait for all children that have ended, up to the first whose process id is in `own`: that one is left to whoever
    started it, who calls this again after that for those behind it. Never blocks."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)
        except ChildProcessError:
            return
