"""A relay with a configuration file of its own, which a test writes again and has it read again."""

import contextlib
import itertools
import os
import signal
import socket
import time
from pathlib import Path

from deadlines import PATIENCE, wait_until
from interception import PORT, ping, processes

from tproxy_relay.lab import Host, Lab, Line
from tproxy_relay.net.endpoint import from_sockaddr

Settings = dict[str, object]

OTHER = PORT + 1
"""A port that is intercepted at some times and not at others."""

BASE: Settings = {
    "intercept-inbound": PORT,
    "intercept-outbound": PORT,
    # No wildcards, so that an address can be added.
    "bind": "127.0.0.1,::1",
    "workers": 1,
    "log-format": "json",
    "log-level": "debug",
}


REST = 0.3
"""Seconds without a change."""


def text_of(settings: Settings) -> str:
    """The file."""
    return "".join(f"{name} = {value}\n" for name, value in settings.items() if value is not None)


class Configured:
    """The relay, and its file. Start it with `with configured.relay:`."""

    def __init__(self, lab: Lab, folder: Path, wrapper: tuple[str, ...] = (), **changes: object) -> None:
        self.lab = lab
        self._ports = itertools.count(20_001)  # below those that the kernel chooses
        self.file = folder / "relay.conf"
        self.base = merged(BASE, changes)
        self.file.write_text(text_of(self.base))
        self.relay = lab.relay_process("--config", str(self.file), wrapper=wrapper)

    def write(self, text: str) -> None:
        """Another file in the place of this one, at once."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(text)
        os.replace(fresh, self.file)

    def hang_up(self, message: str) -> Line:
        """Have it read the file again; the next line of this message."""
        already = self.times(message)
        self.relay.signal(signal.SIGHUP)
        wait_until(lambda: self.times(message) > already or self.relay.returncode is not None, message, 20)
        assert self.relay.returncode is None, self.relay.log
        return self._said(message)[-1]

    def reload(self, **changes: object) -> Line:
        """With the file as it was at the start and these changes, in force when this returns."""
        self.write(text_of(merged(self.base, changes)))
        return self.hang_up("reloaded")

    def refused(self, text: str) -> str:
        """With this file, which it does not want; why."""
        self.write(text)
        return str(self.hang_up("reload refused")["why"])

    def times(self, message: str) -> int:
        """How often it has said that."""
        return len(self._said(message))

    def _said(self, message: str) -> list[Line]:
        return [line for line in self.relay.lines() if line["message"] == message]

    def connect(
        self,
        port: int = PORT,
        source: Host | None = None,
        destination: Host | None = None,
        family: int = socket.AF_INET,
    ) -> socket.socket:
        """A connection, from client to server if nothing else is said. No other one has its port, before or after: it
        is known by that in the log."""
        sock = (source or self.lab.client).socket(family)
        sock.settimeout(PATIENCE)
        sock.bind(("", next(self._ports)))
        sock.connect(((destination or self.lab.server).address(family), port))
        return sock

    def visit(self, source: Host, destination: Host, family: int = socket.AF_INET, port: int = PORT) -> str:
        """A new connection works; the name of its client."""
        with self.connect(port, source, destination, family) as sock:
            assert ping(sock) == ""
            return str(from_sockaddr(sock.getsockname()))

    def opened(self, source: Host, destination: Host, family: int = socket.AF_INET, port: int = PORT) -> Line:
        """A new connection works, and is relayed; what the relay says of it."""
        mine = self.visit(source, destination, family, port)
        return self.relay.wait_for_line(
            lambda line: line["message"] == "connection open" and line["client"] == mine, PATIENCE
        )

    def not_relayed(self, client: str) -> bool:
        """True if that connection went direct. To be asked when a later one was relayed: the log is in order."""
        return not any(line.get("client") == client for line in self.relay.lines())

    @property
    def workers(self) -> list[int]:
        """The process ids of its workers, whatever its log says; those of the newest generation last."""
        found = {}
        for pid in processes(self.lab, "tproxy_relay.worker"):
            with contextlib.suppress(OSError):
                # proc(5): what follows the name is state, parent ...; number 22 is the time of the start.
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == self.relay.pid:
                    found[pid] = (int(fields[19]), pid)
        return sorted(found, key=found.__getitem__)

    def count(self) -> tuple[int, int, int]:
        """Processes in the relay's host, descriptors of the supervisor, and workers."""
        descriptors = len(os.listdir(f"/proc/{self.relay.pid}/fd"))
        return len(processes(self.lab, "-m tproxy_relay")), descriptors, len(self.workers)

    def rest(self, seconds: float = REST) -> tuple[int, int, int]:
        """The same, once it has been so for a while: the last that went has been cleared away."""
        seen, since = self.count(), time.monotonic()

        def is_at_rest() -> bool:
            nonlocal seen, since
            now = self.count()
            if now != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since > seconds

        wait_until(is_at_rest, "it is at rest")
        return seen

    def comes_back_to(self, count: tuple[int, int, int]) -> None:
        """Everything that was there for a while is gone again."""
        wait_until(lambda: self.count() == count, f"{count} again, not {self.count()}", 15)


def merged(settings: Settings, changes: Settings) -> Settings:
    """With `intercept_inbound` for `intercept-inbound`; None leaves a setting out."""
    return {**settings, **{name.replace("_", "-"): value for name, value in changes.items()}}
