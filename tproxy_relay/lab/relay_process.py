"""The relay under test: the real program, in a host of the lab, with its log read as it is written.

All waiting is for an event (a datagram, the end of the process, a line) with a deadline; nothing sleeps.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import tproxy_relay
from tproxy_relay.intercept import programs
from tproxy_relay.lab.host import Host
from tproxy_relay.lab.needs import LabError
from tproxy_relay.net import endpoint

READY_TIMEOUT = 15.0
"""Seconds from start to READY=1. It takes a quarter of one; a loaded CI machine is slower."""
RECORD_TIMEOUT = 10.0
STOP_TIMEOUT = 10.0

_PASSED_ON = (
    *("HOME", "LANG", "LC_ALL", "TMPDIR"),
    *("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "PYTHONOPTIMIZE", "PYTHONWARNINGS"),
    *("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"),
)
"""Of our environment; above all no TPROXY_RELAY_*, LOG_LEVEL or LISTEN_FDS of whoever runs the tests."""

_DEFAULTS = {"--workers": "1", "--self-probe": "0"}
"""A self-probe would be one more connection in the log."""

Line = dict[str, Any]
"""One JSON line of the relay's log."""


class RelayProcess:
    """`tproxy-relay run` with some options, and one worker and no self-probe unless they say otherwise: started and
    ready on entry into the `with`, gone after it."""

    def __init__(self, host: Host, options: Sequence[str], wrapper: Sequence[str] = ()) -> None:
        """`wrapper` is a command that becomes the relay, such as `prlimit --nofile=200`. With `--config` among the
        options nothing is added to them, not even the JSON log, which that file must want then."""
        self.options = tuple(options)
        if "--config" not in self.options:
            for name, value in _DEFAULTS.items():
                self.options += () if name in self.options else (name, value)
        self._wrapper = tuple(wrapper)
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        self._text: list[str] = []
        self._lines: list[Line] = []
        self._log_ended = False
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None

    def __enter__(self) -> "RelayProcess":
        folder = Path(tempfile.mkdtemp(prefix="tproxy-relay-lab-"))
        try:
            # A path and not an abstract name: those do not reach across network namespaces.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.bind(str(folder / "notify"))
                self._start(folder)
                self._await_ready(notify)
        except BaseException:
            self.kill()
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it at once if it still runs. What it exits with is asked by `stop` only."""
        self.signal(signal.SIGINT)
        with contextlib.suppress(LabError):
            self.wait()
        self.kill()

    @property
    def pid(self) -> int:
        """The process id; of the supervisor, if there are workers."""
        return self._running().pid

    @property
    def workers(self) -> list[int]:
        """The process ids of its workers, oldest first, as its log tells."""
        pids = []
        for line in self.lines():
            if line.get("message") == "worker started":
                pids.append(line["pid"])
            elif line.get("message") == "worker ended":
                pids.remove(line["pid"])
        return pids

    @property
    def worker(self) -> int:
        """The process id of its only worker. LabError if there is not exactly one."""
        pids = self.workers
        if len(pids) != 1:
            raise LabError(f"the relay has {len(pids)} workers, not one")
        return int(pids[0])

    @property
    def returncode(self) -> int | None:
        """What it exited with; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        """All that it has written so far."""
        with self._changed:
            return "".join(self._text)

    def lines(self) -> list[Line]:
        """Its log so far: every line that is a JSON object."""
        with self._changed:
            return list(self._lines)

    def records(self) -> list[Line]:
        """Its access lines so far, one for each connection that has ended."""
        return [line for line in self.lines() if line.get("message") == "connection closed"]

    def wait_for_line(self, wanted: Callable[[Line], bool], timeout: float = RECORD_TIMEOUT) -> Line:
        """The first line of the log for which `wanted` is true, past or future."""
        deadline = time.monotonic() + timeout
        with self._changed:
            seen = 0
            while True:
                for line in self._lines[seen:]:
                    if wanted(line):
                        return line
                seen = len(self._lines)
                left = deadline - time.monotonic()
                if self._log_ended or left <= 0:
                    break
                self._changed.wait(left)
        why = "the relay ended" if self._log_ended else f"not within {timeout:g} s"
        raise LabError(f"the expected line is not in the relay's log: {why}; last: {self._last_words()}")

    def wait_for_record(self, wanted: Callable[[Line], bool], timeout: float = RECORD_TIMEOUT) -> Line:
        """The first access line for which `wanted` is true, past or future."""
        return self.wait_for_line(lambda line: line.get("message") == "connection closed" and wanted(line), timeout)

    def follow(self, start: int = 0) -> Iterator[Line]:
        """Each line of the log as it comes, from number `start` of `lines()` on, until the log ends."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._lines) > start or self._log_ended)
                fresh = self._lines[start:]
            if not fresh:
                return
            yield from fresh
            start += len(fresh)

    def record_of(self, client: socket.socket, timeout: float = RECORD_TIMEOUT) -> Line:
        """The access line of the connection of this client's socket, which must still be open here."""
        name = str(endpoint.from_sockaddr(client.getsockname()))
        return self.wait_for_record(lambda record: record.get("client") == name, timeout)

    def signal(self, number: int) -> None:
        """Send it a signal; nothing happens if it has ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def terminate(self) -> None:
        """Send it TERM: it drains and stops. Nothing happens if it has ended."""
        self.signal(signal.SIGTERM)

    def wait(self, timeout: float = STOP_TIMEOUT) -> int:
        """Wait for its end and for the end of its log; the exit code."""
        try:
            code = self._running().wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"the relay still runs after {timeout:g} s; last: {self._last_words()}") from error
        self._join_reader()
        return code

    def stop(self, code: int = 0, timeout: float = STOP_TIMEOUT) -> None:
        """Terminate it; LabError unless it exits with `code`."""
        self.terminate()
        ended = self.wait(timeout)
        if ended != code:
            raise LabError(f"the relay exited with {ended}, not {code}; last: {self._last_words()}")

    def kill(self) -> None:
        """kill -9 for it and its workers, and wait: then nobody listens any more. Nothing happens if it has ended."""
        if self._process is None:
            return
        ends = _ends_of_group(self._process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in ends:
            select.select([end], [], [], STOP_TIMEOUT)
            os.close(end)
        self._join_reader()

    def _start(self, folder: Path) -> None:
        command = [*self._wrapper, sys.executable, "-m", "tproxy_relay", "run"]
        if "--config" not in self.options:
            # /dev/null: an empty file in place of the machine's own configuration.
            command += ["--config", os.devnull, "--log-format", "json", "--log-level", "debug"]
        self._process = self._host.start(
            [*command, *self.options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(folder / "notify"),
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), name="relay-log", daemon=True)
        self._reader.start()

    def _await_ready(self, notify: socket.socket) -> None:
        deadline = time.monotonic() + READY_TIMEOUT
        ended = os.pidfd_open(self.pid)
        watched: list[Any] = [notify, ended]
        try:
            while time.monotonic() < deadline:
                ready, _, _ = select.select(watched, [], [], deadline - time.monotonic())
                if notify in ready and b"READY=1" in notify.recv(4096).split(b"\n"):
                    return
                if ended in ready:
                    break
        finally:
            os.close(ended)
        if self.returncode is None:
            raise LabError(f"the relay is not ready after {READY_TIMEOUT:g} s; last: {self._last_words()}")
        self._join_reader()
        raise LabError(f"the relay exited with {self.returncode} before it was ready: {self._last_words()}")

    def _read(self, stderr: IO[bytes]) -> None:
        with stderr:
            for raw in stderr:
                self._take(raw.decode(errors="replace"))
        with self._changed:
            self._log_ended = True
            self._changed.notify_all()

    def _take(self, text: str) -> None:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        with self._changed:
            self._text.append(text)
            if isinstance(line, dict):
                self._lines.append(line)
            self._changed.notify_all()

    def _running(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise LabError("the relay was not started")
        return self._process

    def _join_reader(self) -> None:
        if self._reader is not None:
            self._reader.join(STOP_TIMEOUT)

    def _last_words(self) -> str:
        lines = self.log.strip().splitlines()
        return lines[-1] if lines else "(it wrote nothing)"


def _ends_of_group(leader: int) -> list[int]:
    """Descriptors that become readable when the processes of the group have ended (pidfd_open(2))."""
    ends = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            group = stat.read_text("utf-8", "replace").rpartition(")")[2].split()[2]  # proc(5): pgrp
            if int(group) == leader:
                ends.append(os.pidfd_open(int(stat.parent.name)))
    return ends


def _environment(notify: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    # So that a checkout that is not installed is what runs, from any working directory.
    package_home = str(Path(tproxy_relay.__file__).resolve().parent.parent)
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [package_home, kept.get("PYTHONPATH", "")]))
    return {**kept, "PATH": programs.search_path(), "NOTIFY_SOCKET": str(notify)}
