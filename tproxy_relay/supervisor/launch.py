"""The first moments of a worker: listening sockets go where sd_listen_fds(3) says, and then it becomes another program.

Run as a script, by an interpreter that loads nothing it does not need:

    python -I -S launch.py 7,9 setpriv ... python -m tproxy_relay.worker

Neither of the two things can be done from the process that starts it: a descriptor gets its number, and LISTEN_PID its
value, only in the new process.
"""

import fcntl
import os
import sys

FIRST = 3
"""SD_LISTEN_FDS_START of sd-daemon.h."""

SMALL_STACKS = "glibc.rtld.nns=1:glibc.rtld.optional_static_tls=0"
"""ld.so(8), GLIBC_TUNABLES: the C library keeps 1.5 KiB at the top of each thread's stack for libraries with
thread-local storage that may be loaded later. None is, and without that two pages of a stack suffice where three were
touched. (tests/bench, an idle connection: 49.1 KiB, 45.3 with this.)"""


def renumber(descriptors: list[int]) -> None:
    """Move them to 3, 4, 5 ... in this order, and close what they were."""
    end = FIRST + len(descriptors)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, end) for fd in descriptors]  # out of the way of each other
    for fd in descriptors:
        os.close(fd)
    for number, copy in enumerate(copies, FIRST):
        os.dup2(copy, number)
        os.close(copy)


def main() -> None:
    """Become the command, with the descriptors of the first argument."""
    descriptors = [int(fd) for fd in sys.argv[1].split(",") if fd]
    renumber(descriptors)
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(descriptors)))
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (os.environ.get("GLIBC_TUNABLES"), SMALL_STACKS)))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
