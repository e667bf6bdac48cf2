"""Talking to the service manager: sd_notify(3), and the sockets that it opened for us (sd_listen_fds(3)).

Both protocols are a few environment variables, and they work without systemd: start-stop-daemon speaks the
first, and any program that leaves listening sockets open from descriptor 3 on speaks the second.
"""

import array
import itertools
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

LISTEN_FDS_START = 3
"""SD_LISTEN_FDS_START of sd-daemon.h: where inherited sockets begin."""


def notify(state: str, environ: Mapping[str, str], descriptors: Sequence[int] = ()) -> None:
    """Tell the service manager, if there is one: `READY=1`, `STOPPING=1`, or `FDSTORE=1` with descriptors. It never
    fails the caller."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendmsg([state.encode()], ancillary, socket.MSG_DONTWAIT, address)
    except OSError:
        return  # whoever asked is gone or does not read, or descriptors have run out: no reason to stop relaying


class Inherited(NamedTuple):
    """A descriptor that was passed to this process."""

    fd: int
    name: str
    """Of LISTEN_FDNAMES; '' if it has none."""


def inherited_descriptors(environ: MutableMapping[str, str]) -> list[Inherited]:
    """The descriptors passed to this very process, and the variables taken away so that no child thinks they
    are for it. Empty if none were passed; ValueError if LISTEN_FDS is no count."""
    pid = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if not count or pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit() and int(count) < 1024):
        raise ValueError(f"LISTEN_FDS is {count!r}, not a number of descriptors")
    numbers = range(LISTEN_FDS_START, LISTEN_FDS_START + int(count))
    return [Inherited(fd, name) for fd, name in zip(numbers, itertools.chain(names, itertools.repeat("")))]
