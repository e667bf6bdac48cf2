"""The load generator, load/*.c, at both ends: the server that knows who has come, and one run of the client."""

import ipaddress
import json
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from tproxy_relay.lab import Host, LabError

HERE = Path(__file__).parent


class Arrivals(NamedTuple):
    """What has come to one port of the server so far, at a time of CLOCK_MONOTONIC."""

    time: float
    received: int
    """Bytes."""
    sources: Counter[str]
    """Connections, by the address that they came from."""


class Server:
    """It serves all modes, on all ports."""

    def __init__(self, host: Host, program: Path, ports: Sequence[int]) -> None:
        argv = [str(program), "server", *map(str, ports)]
        self._process = host.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if _line(self._process) != "up":
            self.close()
            raise LabError("the load server has not started")

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def arrivals(self, port: int) -> Arrivals:
        """Ask it."""
        _send(self._process, "")
        said = json.loads(_line(self._process))
        of_port = said.get(str(port), {"bytes": 0, "from": {}})
        sources = Counter({_readable(address): count for address, count in of_port["from"].items()})
        return Arrivals(said["time"], of_port["bytes"], sources)

    def close(self) -> None:
        """May be called again."""
        _end(self._process)


class Client:
    """A run of it; in a `with`."""

    def __init__(self, host: Host, program: Path, mode: str, *arguments: object) -> None:
        # What it has to complain about is one line; a pipe that nobody reads would not hold more than it needs.
        self._complaint: IO[bytes] = tempfile.TemporaryFile()
        argv = [str(program), mode, *map(str, arguments)]
        self._process = host.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaint)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _end(self._process)
        self._complaint.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def expect(self, word: str) -> None:
        """Wait until it says so: `go` or `end`."""
        said = self._heard()
        if said != word:
            raise LabError(f"the load generator says {said!r} and not {word!r}")

    def result(self) -> dict[str, Any]:
        """Of the next measurement."""
        found: dict[str, Any] = json.loads(self._heard())
        return found

    def ask(self, response: int) -> dict[str, Any]:
        """Of idle connections: an exchange in each, with so many bytes back."""
        _send(self._process, str(response))
        return self.result()

    def stop(self) -> None:
        """The measurement, not the program: it will say what it has found."""
        self._process.terminate()

    def _heard(self) -> str:
        said = _line(self._process)
        if not said:
            self._process.wait()
            self._complaint.seek(0)
            why = self._complaint.read().decode(errors="replace").strip()
            raise LabError(
                why or f"the load generator ended with {self._process.returncode} (-14: it has waited too long)"
            )
        return said


def compiled(sources: Sequence[Path], program: Path) -> Path:
    """The program, from these files of C. Raises LabError without a compiler."""
    if shutil.which("cc") is None:
        raise LabError("there is no C compiler; install gcc and libc6-dev")
    subprocess.run(["cc", "-O2", "-pthread", "-o", str(program), *map(str, sources)], check=True)
    return program


def _readable(address: str) -> str:
    """Without the IPv6 clothes of an IPv4 address."""
    parsed = ipaddress.IPv6Address(address)
    return str(parsed.ipv4_mapped or parsed)


def _send(process: "subprocess.Popen[bytes]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n".encode())
    process.stdin.flush()


def _line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
