"""Messages between processes of the relay: one JSON object each, and descriptors that go with it.

A SOCK_SEQPACKET pair of unix(7): the kernel keeps messages apart and in order, and tells the end when the other
process is gone, however it went.
"""

import array
import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 128 * 1024
"""Of one message. The kernel's own limit is the send buffer, 208 KiB unless net.core.wmem_default says otherwise."""

MAX_DESCRIPTORS = 253
"""In one message: SCM_MAX_FD of net/scm.h (unix(7))."""

Message = dict[str, Any]


class Channel:
    """One end. One thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        """Readable when a message or the end has come."""
        return self._sock.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Hand a message over without waiting. False if the other end is gone, or has not read for so long that there
        is no room. Raises ValueError if it is too long."""
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_BYTES or len(descriptors) > MAX_DESCRIPTORS:
            raise ValueError(f"a message of {len(data)} bytes and {len(descriptors)} descriptors is too long")
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            # Not socket.send_fds(), which forgets the flags before Python 3.12.
            self._sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def receive(self, timeout: float | None = None) -> tuple[Message, list[int]] | None:
        """The next message and its descriptors, which are the caller's now and closed on exec; None for the end.

        TimeoutError after `timeout` seconds without one (None: it waits for ever); ValueError for anything that is no
        message.
        """
        self._sock.settimeout(timeout)
        try:
            data, descriptors, flags, _ = socket.recv_fds(self._sock, MAX_BYTES, MAX_DESCRIPTORS)
        except ConnectionResetError:
            return None  # gone with messages of ours unread
        finally:
            self._sock.settimeout(None)
        for fd in descriptors:
            os.set_inheritable(fd, False)
        if not data:
            _close(descriptors)
            return None
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close(descriptors)
            raise ValueError("a message was cut short")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            _close(descriptors)
            raise ValueError("a message is not JSON") from error
        if not isinstance(message, dict):
            _close(descriptors)
            raise ValueError("a message is not an object")
        return message, descriptors

    def shut(self) -> None:
        """Nothing is sent or taken in any more: the other end can no longer send, and what it has sent is the rest."""
        with contextlib.suppress(OSError):  # it is gone
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let the other end see the end."""
        self._sock.close()


def pair() -> tuple[Channel, Channel]:
    """A new channel, as its two ends. Raises OSError if there are no descriptors for it."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(one), Channel(other)


def adopt(fd: int) -> Channel:
    """The end that another process has left to this one. Raises OSError if it is no socket."""
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    return Channel(sock)


def _close(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        os.close(fd)
