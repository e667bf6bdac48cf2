"""One owner of the ruleset in each network namespace: a name that the kernel takes back when its holder dies.

The name is an abstract unix socket's (unix(7)); such names are counted by network namespace, as rules are. Any account
may take one, so who asks learns whose it is.
"""

import os
import socket
import struct
from typing import NamedTuple

from tproxy_relay.errors import SystemRefusedError

NAME = "\0tproxy_relay/ruleset"

ANSWER_TIMEOUT = 0.5
"""Seconds for the holder to say which process it holds the ruleset for."""

_UCRED = struct.Struct("@3i")
"""unix(7), SO_PEERCRED: process, user and group id."""


class Holder(NamedTuple):
    """Who holds the ruleset."""

    pid: int
    """The relay's process, or that of a command that is just changing rules."""
    uid: int


class Lock:
    """Hold it while changing rules. Raises SystemRefusedError if somebody else does."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            self._socket.bind(NAME)
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise SystemRefusedError(_whose(holder())) from error

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when somebody asks who holds it."""
        return self._socket.fileno()

    def answer(self, pid: int) -> None:
        """Tell those who ask that it is held for this process."""
        try:
            while True:
                asking, _ = self._socket.accept()
                with asking:
                    asking.send(str(pid).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return  # all have been told, or did not wait for it

    def close(self) -> None:
        """Give it back."""
        self._socket.close()


def holder() -> Holder | None:
    """Who holds it; None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_TIMEOUT)
        try:
            sock.connect(NAME)
            pid, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        except OSError:
            return None
        try:
            told = sock.recv(20)
        except OSError:
            told = b""
    return Holder(int(told) if told.isdigit() else pid, uid)


def _whose(who: Holder | None) -> str:
    if who is None:
        return "somebody else is changing the ruleset of this host: try again"
    if who.uid not in (0, os.geteuid()):
        return (
            f"process {who.pid} of account number {who.uid} has taken the name @{NAME[1:]}, "
            "with which relays agree on who holds the ruleset: end that process first"
        )
    return f"process {who.pid} holds the ruleset of this host: stop that relay first"
