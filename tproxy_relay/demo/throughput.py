"""How fast one connection is, from the client to the server, measured where the bytes arrive."""

import subprocess
import sys
from dataclasses import dataclass

from tproxy_relay.demo import exchanges, stream
from tproxy_relay.lab import Lab, LabError
from tproxy_relay.net.endpoint import Endpoint

SECONDS = 1.5
"""Of sending. Long enough for the buffers to grow, short enough to wait for."""
TRANSFER_TIMEOUT = 15.0
"""Seconds for both ends to be done, the start of their interpreters included."""


@dataclass(frozen=True)
class Measured:
    """A transfer, and who saw whom in it."""

    name: Endpoint
    asked_for: Endpoint
    seen: Endpoint
    bytes: int
    seconds: float

    @property
    def gbit_per_second(self) -> float:
        """In 10^9 bits, as network people count."""
        return self.bytes * 8 / self.seconds / 1e9


def measure(lab: Lab, port: int) -> Measured:
    """Send over one IPv4 connection; each end is a process of its own, on its host."""
    with exchanges.conversation(lab, port) as talk:
        for sock in (talk.client, talk.server):
            sock.settimeout(None)  # non-blocking would be so in the programs too: they share the open file
        ends = talk.client.fileno(), talk.server.fileno()
        receiver = lab.server.start(_argv("receive", ends[1]), stdout=subprocess.PIPE, pass_fds=(ends[1],))
        sender = lab.client.start(_argv("send", ends[0], SECONDS), pass_fds=(ends[0],))
    with receiver, sender:
        try:
            said, _ = receiver.communicate(timeout=TRANSFER_TIMEOUT)
            failed = sender.wait(TRANSFER_TIMEOUT) or receiver.returncode
        except subprocess.TimeoutExpired as error:
            receiver.kill()
            sender.kill()
            raise LabError(f"the transfer to port {port} hangs") from error
    if failed:
        raise LabError(f"the transfer to port {port} broke off")
    total, seconds = said.split()
    return Measured(talk.name, talk.asked_for, talk.seen, int(total), float(seconds))


def _argv(*arguments: object) -> list[str]:
    return [sys.executable, "-I", "-S", stream.__file__, *map(str, arguments)]
