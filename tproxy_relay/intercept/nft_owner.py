"""`nft -i` as the owner of the table: while it lives nobody else can change the table, not even `nft flush ruleset`,
and when it ends, however it ends, the kernel takes the table away (nft(8), flags owner; Linux 5.12).

It ends when its standard input does, so it does not outlive the process that made it.
"""

import os
import select
import subprocess
import time

from tproxy_relay.intercept import nft, programs
from tproxy_relay.intercept.programs import ProgramError
from tproxy_relay.system import children

_SYNC = "describe meta mark"
_SYNCED = "meta expression"
"""nft's interactive mode has no prompt on a pipe and says nothing of success: this question has a known answer."""


class NftOwner:
    """The child that owns the table, and the way to have it change that."""

    def __init__(self) -> None:
        self._at_end = False
        self._child = subprocess.Popen(
            [programs.require("nft"), "-i"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Its history file would go to HOME.
            env=children.program_environment({"HOME": os.devnull}, programs.search_path()),
        )

    @property
    def pid(self) -> int:
        """The process id of `nft -i`, which owns the table."""
        return self._child.pid

    @property
    def alive(self) -> bool:
        """False once it has ended, and the table with it."""
        return not self._at_end and self._child.poll() is None

    def has_ended(self) -> bool:
        """When its output is readable: True if that is because there will be no more."""
        self._at_end = not os.read(self.fileno(), 65536)
        return self._at_end

    def fileno(self) -> int:
        """A descriptor that becomes readable when the child ends."""
        assert self._child.stdout is not None
        return self._child.stdout.fileno()

    def load(self, text: str) -> None:
        """Hand it one transaction. Raises ProgramError or CapabilityMissingError with what it said."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(f"{nft.one_line(text)}\n{_SYNC}\n".encode())
            self._child.stdin.flush()
        except OSError as error:
            raise ProgramError("nft -i has ended") from error
        said = self._read_answer()
        if "error" in said.lower():
            raise programs.refusal(["nft", "-i"], said)

    def _read_answer(self) -> str:
        deadline, said = time.monotonic() + programs.TIMEOUT, b""
        while b"\n" not in said.partition(_SYNCED.encode())[2]:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self], [], [], left)[0]:
                raise ProgramError(f"nft -i did not answer within {programs.TIMEOUT:g} s")
            chunk = os.read(self.fileno(), 65536)
            if not chunk:
                raise programs.refusal(["nft", "-i"], said.decode(errors="replace") or "it ended")
            said += chunk
        return said.decode(errors="replace").split(_SYNCED)[0]

    def close(self) -> None:
        """End it; the table is gone when this returns."""
        if self._child.stdin is not None and not self._child.stdin.closed:
            try:
                self._child.stdin.close()
            except OSError:
                pass  # it was gone already
        try:
            self._child.wait(programs.TIMEOUT)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
