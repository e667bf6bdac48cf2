"""Unix sockets by which processes of this host find each other: abstract names, and who is at the other end.

An abstract name (unix(7)) begins with a zero byte and is in no folder. It exists in one network namespace, as
listeners and rules do, and the kernel takes it back when its holder dies. Anybody may take one, so both ends ask the
kernel who the other one is.
"""

import os
import re
import socket
from collections.abc import Iterator
from typing import NamedTuple

from tproxy_relay.net import linux


class Peer(NamedTuple):
    """The process at the other end, as it was when it connected or began to listen (unix(7), SO_PEERCRED)."""

    pid: int
    """0 if it is in a pid namespace that this one does not see."""
    uid: int


def peer(sock: socket.socket) -> Peer:
    """Who is at the other end of a connected unix socket. OSError if the kernel does not tell."""
    pid, uid, _ = linux.UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, linux.UCRED.size))
    return Peer(pid, uid)


def is_trusted(uid: int) -> bool:
    """True for root and for our own account: they may change what this process does, and need not lie to it."""
    return uid in (0, os.geteuid())


def abstract(name: str) -> str:
    """The address to bind or connect to for that abstract name."""
    return f"\0{name}"


def numbered(prefix: str) -> Iterator[int]:
    """The numbers behind that prefix in the abstract names of this network namespace (proc(5), /proc/net/unix); OSError
    without /proc."""
    with open("/proc/net/unix", encoding="ascii", errors="replace") as lines:
        names = {line.split()[-1] for line in lines}
    for name in sorted(names):
        if found := re.fullmatch(rf"@{re.escape(prefix)}(\d+)", name):
            yield int(found[1])
