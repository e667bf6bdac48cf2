"""One owner of the ruleset in each network namespace: a name that the kernel takes back when its holder dies.

The name is an abstract unix socket's (unix(7)); such names are counted by network namespace, as rules are. Any account
may take one, so who asks learns whose it is. A guard that lingers for the last transfers of relays that are no more
(guard.py) gives it back to one who wants it, and who waits for that on the same connection.
"""

import socket
from typing import NamedTuple

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.net import unix_sockets

NAME = "tproxy_relay/ruleset"

ANSWER_TIMEOUT = 0.5
"""Seconds for the holder to say which process it holds the ruleset for."""
WAIT_TIMEOUT = 4.0
"""Seconds for it to give it back, if it says so."""
TRIES = 3
"""Somebody else may be quicker to take what was given back."""

_WAIT = b"wait"


class Holder(NamedTuple):
    """The process that holds the ruleset, and its account."""

    pid: int
    """The relay's process, or that of a command that is just changing rules."""
    uid: int


class Lock:
    """Hold it while changing rules. Raises SystemRefusedError if somebody else does."""

    def __init__(self) -> None:
        self._waiting: list[socket.socket] = []
        for tries_left in reversed(range(TRIES)):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            try:
                self._socket.bind(unix_sockets.abstract(NAME))
                self._socket.listen()
                return
            except OSError as error:
                self._socket.close()
                who = _ask(wanted=True)
                if who is not None or not tries_left:
                    raise SystemRefusedError(_whose(who)) from error

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when somebody asks who holds it."""
        return self._socket.fileno()

    def answer(self, pid: int, *, lingers: bool = False) -> bool:
        """Tell those who ask that it is held for this process. If it only `lingers`, those who want it are told to
        wait until it is given back; True if there are any."""
        try:
            while True:
                asking, name = self._socket.accept()
                if lingers and name and unix_sockets.is_trusted(unix_sockets.peer(asking).uid):
                    self._waiting.append(asking)
                    asking.send(_WAIT, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                    continue
                with asking:
                    asking.send(str(pid).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return bool(self._waiting)  # all have been told, or did not wait for it

    def close(self) -> None:
        """Give it back, and then tell those who wait."""
        for sock in (self._socket, *self._waiting):
            sock.close()


def holder() -> Holder | None:
    """Who holds it; None if nobody does."""
    return _ask(wanted=False)


def _ask(*, wanted: bool) -> Holder | None:
    """None, too, if it has just been given back. One who wants it gives its socket a name, so that the holder knows
    that when it is connected."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(ANSWER_TIMEOUT)
        try:
            if wanted:
                sock.bind("")  # any, see unix(7) on autobind
            sock.connect(unix_sockets.abstract(NAME))
        except OSError:
            return None
        pid, uid = unix_sockets.peer(sock)
        try:
            told = sock.recv(20)
            if told == _WAIT:
                sock.settimeout(WAIT_TIMEOUT)
                told = sock.recv(20)
        except TimeoutError:
            return Holder(pid, uid)
        except OSError:
            return None
    return Holder(int(told) if told.isdigit() else pid, uid) if told else None


def _whose(who: Holder | None) -> str:
    if who is None:
        return "somebody else is changing the ruleset of this host: try again"
    if not unix_sockets.is_trusted(who.uid):
        return (
            f"process {who.pid} of account number {who.uid} has taken the name @{NAME}, "
            "with which relays agree on who holds the ruleset: end that process first"
        )
    return f"process {who.pid} holds the ruleset of this host: stop that relay first"
