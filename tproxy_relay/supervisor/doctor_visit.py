"""One look of the doctor: the process that does it (check/__main__.py), what it is told, and what it has said so far.

Nothing here waits for that process but its end, for a moment: it may hang, and the relay must not.
"""

import contextlib
import json
import os
import subprocess
import time
from typing import Any

from tproxy_relay.system import children

TIMEOUT = 30.0
"""Seconds for one look; it takes half of one, and some more for each connection that does not get through."""
END_TIMEOUT = 1.0
"""Seconds for a process that has said all to end, and for one that was killed."""


class Visit:
    """The process, and what it has said so far."""

    def __init__(self, parts: list[str], order: dict[str, Any], begun_in: tuple[int, str]) -> None:
        """Start it. `begun_in`: the number of the generation and the digest of the plan that it looks at. Raises
        OSError."""
        self.parts = parts
        self.begun_in = begun_in
        self.lines: list[dict[str, Any]] = []
        """Of its answer, those that are whole."""
        self.began_at = time.monotonic()
        self.until = self.began_at + TIMEOUT
        """Then it is to be ended (time.monotonic())."""
        self._rest = b""
        self._unsent = json.dumps(order).encode() + b"\n"
        self._process = subprocess.Popen(
            children.module_command("tproxy_relay.check"),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=children.own_environment(without=children.OF_THE_MANAGER),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.order_pipe, self._out = self._process.stdin, self._process.stdout
        """Its end is ours, for the process: so it stays open."""
        os.set_blocking(self.order_pipe.fileno(), False)

    def send(self) -> bool:
        """Send as much of the order as the pipe takes now (64 KiB as a rule, pipe(7)); True if some of it is left, for
        when the pipe is writable."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.order_pipe.fileno(), self._unsent) :]
        except BlockingIOError:
            return True
        except OSError:  # it has died already; the end of its answer tells
            self._unsent = b""
        return False

    def fileno(self) -> int:
        """Readable when it has said something, or has ended."""
        return self._out.fileno()

    def read(self) -> bool:
        """Take what it has said; False at its end."""
        chunk = os.read(self.fileno(), 65536)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        with contextlib.suppress(ValueError):
            self.lines += [json.loads(line) for line in whole]
        return bool(chunk)

    @property
    def is_whole(self) -> bool:
        """True if it has done all that it was told to."""
        return bool(self.lines) and "done" in self.lines[-1]

    def close(self, *, at_once: bool) -> None:
        """Wait for its end, and see to it that it comes. The kernel takes away what it has made for the moment. One
        that hangs within the kernel even then is left behind."""
        if at_once:
            self._process.kill()
        self.order_pipe.close()
        self._out.close()
        try:
            self._process.wait(END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT)
