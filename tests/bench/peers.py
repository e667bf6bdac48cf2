"""What is compared. Here: what all have in common, our relay, and no relay at all; others.py has the rest.

Each is started as its users would, with the same job: accept what is steered to it, connect to where it was going, from
its own address unless a variant says otherwise.
"""

import json
import os
import platform
import pwd
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import usage
from generator import HERE
from stage import FIRST_LISTENER, FIRST_PORT, Stage

import tproxy_relay
from tproxy_relay.lab import LabError, RelayProcess

PROJECT = Path(tproxy_relay.__file__).parents[1]
READY = 20.0
"""Seconds for a relay to listen."""
SETTLED = 10.0
"""Seconds for it to be done with the connections of the last measurement."""
RECORDED = 60.0
"""Seconds for the last record of ours, of 9,000 connections that end at once."""


class Absent(Exception):
    """It is not installed; str() says what to install."""


class Unable(Exception):
    """It is not made for this; str() says why."""


class Variant(NamedTuple):
    """A way to run that is not the default one."""

    preserving: bool = False
    """The server sees the address of the client."""
    processors: int | None = None
    """So many workers, or threads that handle events."""


DEFAULT = Variant()


class Peer:
    """One of them; this one is none: traffic that is not relayed."""

    name = "direct"

    def __init__(self, stage: Stage, number: int, options: Sequence[str] = ()) -> None:
        self.stage = stage
        self.port = FIRST_PORT + number
        """Of the server, by which its traffic is known."""
        self.listener = FIRST_LISTENER + 2 * number
        self.options = tuple(options)
        self.folder = stage.folder / self.name
        self.folder.mkdir()
        self.variant: Variant | None = None
        """None: it does not run."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def most(self) -> int:
        """Connections that it can hold."""
        return 1_000_000

    def version(self) -> str:
        """For the record. Raises Absent."""
        return f"Linux {platform.release()}"

    def run(self, variant: Variant = DEFAULT, *, fresh: bool = False) -> None:
        """See to it that it runs in this way; with `fresh` it has never relayed anything. Raises Unable."""
        if fresh or self.variant != variant:
            self.stop()
            self.start(variant)
            self.variant = variant

    def start(self, variant: Variant) -> None:
        """Listening, when this returns, and traffic steered to it. Raises Unable."""
        if variant.processors is not None:
            raise Unable("no processes")

    def stop(self) -> None:
        """May be called again."""
        self.variant = None
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def sources(self) -> set[str]:
        """The addresses that the server sees."""
        return {self.stage.lab.client.ipv4, self.stage.lab.client.ipv6}

    def pids(self) -> list[int]:
        """All its processes."""
        return [] if self._process is None else usage.family_of(self._process.pid)

    @contextmanager
    def witnessed(self) -> Iterator[None]:
        """What happens inside must have gone through it; LabError if it has not: the server tells who has come."""
        before = self.stage.server.arrivals(self.port).sources
        yield
        came = self.stage.server.arrivals(self.port).sources - before
        past = set(came) - self.sources
        if past or not came:
            who = f"from {', '.join(sorted(past))}" if past else "at all"
            raise LabError(f"not relayed by it: the server has seen connections {who}" if past else "nobody came")

    def rest(self) -> None:
        """Wait until it, and the server, are done with what was."""
        deadline = time.monotonic() + SETTLED
        pids = [*self.pids(), self.stage.server.pid]
        used = usage.processor_time(pids)
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, used = used, usage.processor_time(pids)
            if used - before <= usage.TICK:
                break


class Relay(Peer):
    """Ours: the shipped configuration, and what the topology needs. Its log goes to a file."""

    name = "relay"

    def version(self) -> str:
        commit = subprocess.run(
            ["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
        return f"{tproxy_relay.__version__} {commit.stdout.strip()}, Python {platform.python_version()}"

    def start(self, variant: Variant) -> None:
        config = self.folder / "conf"
        config.write_text("\n".join(self._configuration(variant)) + "\n")
        self._relay = RelayProcess(self.stage.lab.relay, ("--config", str(config)))
        self.stage.lab.relays.append(self._relay)
        self._relay.__enter__()

    def stop(self) -> None:
        if self.variant is not None:
            self._relay.__exit__(None, None, None)
        self.variant = None

    def _configuration(self, variant: Variant) -> Iterator[str]:
        shipped = (PROJECT / "etc/tproxy-relay.conf").read_text()
        yield shipped if _can_run_as("tproxy-relay") else re.sub("^user = .*$", "", shipped, flags=re.MULTILINE)
        first = self.listener
        yield f"ports = {first},{first + 1}"
        yield f"inbound-port = {first}"
        yield f"outbound-port = {first + 1}"
        yield f"intercept-inbound = {self.port}"
        yield f"log-file = {self._log}"
        if variant.preserving:
            yield "preserve-source = full"
        if variant.processors is not None:
            yield f"workers = {variant.processors}"
        yield from self.options

    @property
    def sources(self) -> set[str]:
        lab = self.stage.lab
        preserving = self.variant is not None and self.variant.preserving or "preserve-source" in " ".join(self.options)
        return super().sources if preserving else {lab.relay_address(), lab.relay_address(socket.AF_INET6)}

    def pids(self) -> list[int]:
        return [] if self.variant is None else usage.family_of(self._relay.pid)

    @contextmanager
    def witnessed(self) -> Iterator[None]:
        """And its log has a record of each connection."""
        seen = self._log.stat().st_size
        before = self.stage.server.arrivals(self.port).sources.total()
        with super().witnessed():
            yield
        wanted = self.stage.server.arrivals(self.port).sources.total() - before
        found, deadline = 0, time.monotonic() + RECORDED
        with self._log.open("rb") as log:
            log.seek(seen)
            while time.monotonic() < deadline:
                found += log.read().count(b'"connection closed"')
                if found >= wanted:
                    return
                time.sleep(0.02)
        raise LabError(f"not all relayed by it: {wanted} connections at the server, {found} records")

    def warnings(self) -> list[str]:
        """Lines of its log above info."""
        with self._log.open() as lines:
            return [line.strip() for line in lines if json.loads(line)["levelname"] not in ("INFO", "DEBUG")]

    @property
    def _log(self) -> Path:
        return self.folder / "log"


def _can_run_as(account: str) -> bool:
    """If there is such an account here, and it could read the program."""
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return os.geteuid() == 0 and all(folder.stat().st_mode & 0o001 for folder in [PROJECT, *PROJECT.parents])
