"""A throw-away network namespace: rules can be tried in it, and connections made from it; nothing of it stays."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from tproxy_relay.check import socket_maker
from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs

START_TIMEOUT = 5.0


class Namespace:
    """To be used in a `with`. RelayError if this host does not allow it."""

    def __init__(self, *, user: bool) -> None:
        """`user`: with a user namespace round it, for those who are not root."""
        self._user = ["-U", "--preserve-credentials"] if user else []
        lead = [programs.require("unshare"), *(["-U", "-r"] if user else []), "-n", "--"]
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_TIMEOUT)
        with theirs:
            self._process = subprocess.Popen(
                [*lead, sys.executable, "-I", "-S", socket_maker.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def __enter__(self) -> "Namespace":
        try:
            if self._control.recv(16) == b"ready":
                return self
        except OSError:
            pass
        said = self._end().decode(errors="replace").strip().splitlines()
        raise RelayError(f"no network namespace to be had ({said[-1] if said else 'unshare failed'})")

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> bytes:
        self._control.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(START_TIMEOUT)
        self._process.kill()
        _, said = self._process.communicate()
        return said or b""

    @property
    def pid(self) -> int:
        """A process in it."""
        return self._process.pid

    def run(self, argv: Sequence[str], stdin: str = "") -> str:
        """Run a program in it. Raises RelayError if it fails."""
        return programs.run(["nsenter", "-t", str(self.pid), *self._user, "-n", "--", *argv], stdin).stdout

    def ip(self, *lines: str) -> None:
        """Run these lines of `ip -batch`."""
        self.run(["ip", "-batch", "-"], "\n".join([*lines, ""]))

    def socket(self, family: int) -> socket.socket:
        """A TCP socket whose packets live there. OSError if there is no such family."""
        self._control.send(bytes([family]))
        # Not socket.recv_fds(): it ignores its flags, and the descriptor would leak into children.
        answer, ancillary, _, _ = self._control.recvmsg(1, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
        if not ancillary:
            number = answer[0] if answer else 0
            raise OSError(number, os.strerror(number))
        return socket.socket(fileno=int.from_bytes(ancillary[0][2][:4], sys.byteorder))
