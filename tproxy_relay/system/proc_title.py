"""What ps, top and pkill call the processes of the relay, and by what a service manager knows them: each would be
`python3` otherwise."""

import contextlib

SUPERVISOR = "tproxy-relay"
WORKER = "tproxy-worker"
GUARD = "tproxy-guard"


def become(name: str) -> None:
    """Call this process so (proc(5), /proc/PID/comm: TASK_COMM_LEN of linux/sched.h leaves 15 bytes). From its main
    thread, before there are others."""
    with contextlib.suppress(OSError):  # no /proc, or one that is read-only: then it is called as before
        with open("/proc/self/comm", "w", encoding="ascii") as comm:
            comm.write(name)
