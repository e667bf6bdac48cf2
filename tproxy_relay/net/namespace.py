"""A network namespace that is thrown away: its sockets are used from here, and nothing of it stays.

It has no name and no mount. It lives as long as the process in it (namespace_agent.py), and that as long as this
end of the socket to it.
"""

import contextlib
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tproxy_relay.net import namespace_agent

START_TIMEOUT = 10.0
"""Seconds for the process to say that it lives, which takes some 30 ms, and for each answer."""
STOP_TIMEOUT = 10.0

_DESCRIPTOR = struct.Struct("@i")
"""What SCM_RIGHTS carries (unix(7)): an int for each descriptor."""

Socket = socket.socket
"""Inside the class below, `socket` is its method."""


class NoNamespaceError(Exception):
    """The namespace could not be made: the last line of what was said of that, or nothing."""


class GoneError(OSError):
    """The process in the namespace does not answer."""


class NetworkNamespace:
    """A namespace and the process in it. Safe to use from several threads."""

    def __init__(
        self, enter: Sequence[str], *, env: Mapping[str, str] | None = None, presence: int | None = None
    ) -> None:
        """Start it: `enter` is the command that becomes the command after it in the new namespace. `await_ready` is to
        be called before anything else.

        `presence` is the read end of a pipe. With it every process in the namespace is killed at the end, those too
        that are on their way into it and have the write end.
        """
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_TIMEOUT)
        with theirs:
            kept = [theirs.fileno(), *([] if presence is None else [presence])]
            # -S: no site-packages; -I: nothing of the user's environment.
            self._process = subprocess.Popen(
                [*enter, sys.executable, "-I", "-S", namespace_agent.__file__, *map(str, kept)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=env,
                pass_fds=kept,
                start_new_session=True,
            )

    def await_ready(self) -> None:
        """Wait for the namespace to exist. Raises NoNamespaceError if it could not be made."""
        with contextlib.suppress(OSError):
            if self._control.recv(namespace_agent.MESSAGE_LIMIT):
                return
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(START_TIMEOUT)
        self._process.kill()
        said = self._process.communicate()[1].decode(errors="replace").strip().splitlines()
        raise NoNamespaceError(*said[-1:])

    @property
    def pid(self) -> int:
        """A process in it, for nsenter and /proc/PID/ns; it lives as long as the namespace."""
        return self._process.pid

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> Socket:
        """An ordinary socket object, for use right here, whose packets live there. OSError if the kernel refuses it."""
        _, descriptor = self._ask("socket", int(family), int(kind), protocol)
        assert descriptor is not None
        return Socket(fileno=descriptor)

    def read(self, path: str) -> str:
        """The text of a file as it is seen there, for /proc/sys/net and its like. OSError if it cannot be read."""
        answer, _ = self._ask("read", path)
        return str(answer["text"])

    def write(self, path: str, text: str) -> None:
        """Write such a file. OSError if there is none such, or if the kernel does not want that."""
        self._ask("write", path, text)

    def close(self) -> None:
        """End it; done when it is gone. May be called again."""
        self._control.close()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def _ask(self, *request: object) -> tuple[dict[str, Any], int | None]:
        with self._lock:
            try:
                self._control.send(json.dumps(request).encode())
                # Not socket.recv_fds(): it ignores its flags, and the descriptor would leak into children.
                message, ancillary, _, _ = self._control.recvmsg(
                    namespace_agent.MESSAGE_LIMIT, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise GoneError(str(error)) from error
        if not message:
            raise GoneError("it has ended")
        answer: dict[str, Any] = json.loads(message)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["error"], str(request[1]))
        return answer, _DESCRIPTOR.unpack(ancillary[0][2])[0] if ancillary else None
