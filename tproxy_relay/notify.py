"""Talking to the service manager: sd_notify(3), and the sockets that it opened for us (sd_listen_fds(3)).

Both protocols are a few environment variables, and they work without systemd: start-stop-daemon speaks the
first, and any program that leaves listening sockets open from descriptor 3 on speaks the second.
"""

import os
import socket
from collections.abc import MutableMapping

LISTEN_FDS_START = 3
"""SD_LISTEN_FDS_START of sd-daemon.h: where inherited sockets begin."""


def notify(state: str, environ: MutableMapping[str, str]) -> None:
    """Tell the service manager, if there is one: `READY=1`, `STOPPING=1`. It never fails the caller."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), socket.MSG_DONTWAIT, address)
    except OSError:
        return  # whoever asked is gone or does not read, or descriptors have run out: no reason to stop relaying


def inherited_descriptors(environ: MutableMapping[str, str]) -> list[int]:
    """The descriptors passed to this very process, and the variables taken away so that no child thinks they
    are for it. Empty if none were passed; ValueError if LISTEN_FDS is no count."""
    pid = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    environ.pop("LISTEN_FDNAMES", None)
    if not count or pid != str(os.getpid()):
        return []
    if not (count.isascii() and count.isdigit() and int(count) < 1024):
        raise ValueError(f"LISTEN_FDS is {count!r}, not a number of descriptors")
    return list(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)))
