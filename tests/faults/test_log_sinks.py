"""Whoever should take the log is stuck, gone or full: traffic goes on, and what was lost is counted."""

import contextlib
import fcntl
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from deadlines import wait_until
from rows import Seen
from swarm import Script, come_and_go, echo_server

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.logs.writer import DROP_REPORT_INTERVAL, QUEUE_LENGTH

pytestmark = pytest.mark.slow

PORT = 8000
CLIENTS = 50
SIZE = 200_000
"""Bytes that each of them sends and wants back: more than the socket buffers of the way hold."""
SMALLEST_PIPE = 4096
PATIENCE = 20.0
AT_START, AT_END = 2, 3
"""Lines that the relay writes without any client: worker started, listening; draining, worker ended, stopped."""
QUIET = 1.0
"""Seconds over which the relay's use of the processor is measured."""

Line = dict[str, Any]


class Pipe:
    """A named pipe that is the relay's standard error, and that nobody reads until a test does."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
        # The shell becomes the relay, with its standard error in the pipe.
        self.wrapper = ("sh", "-c", 'exec "$@" 2>"$0"', str(path))
        self.lines: list[Line] = []
        self._rest = b""

    def close(self) -> None:
        """The reader is gone."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def read_until(self, wanted: Callable[[Line], bool]) -> Line:
        """Read on to the line; what came before it is in `lines`."""
        deadline = time.monotonic() + PATIENCE
        while True:
            block = self._read(deadline)
            assert block, "the line is not in the log"
            for line in self._take(block):
                if wanted(line):
                    return line

    def read_until_accounted_for(self, records: int) -> None:
        """Read on until so many are in the log or counted as lost, as long as anything comes: 4 KiB at a time."""
        while accounted_for(self.lines) != records:
            self._take(self._read(time.monotonic() + PATIENCE))

    def read_all(self) -> None:
        """Read to the end, which is that of a line: the relay is gone."""
        self.read_what_is_there()
        assert not self._rest, "the log ends within a line"

    def read_what_is_there(self) -> None:
        """The same where the relay was not able to write all of it."""
        deadline = time.monotonic() + PATIENCE
        while block := self._read(deadline):
            self._take(block)

    def _read(self, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([self._fd], [], [], max(0.0, left))
        assert ready, "nothing more came from the log"
        return os.read(self._fd, 65536)

    def _take(self, block: bytes) -> list[Line]:
        *whole, self._rest = (self._rest + block).split(b"\n")
        new = [json.loads(line) for line in whole]
        self.lines += new
        return new


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Pipe]:
    with contextlib.closing(Pipe(tmp_path / "stderr")) as made:
        yield made


@pytest.fixture
def clients(fresh_lab: Lab) -> Iterator[Script]:
    """Obedient clients of an echo server; connections to it are intercepted."""
    fresh_lab.intercept((PORT,))
    with echo_server(fresh_lab.server, PORT):
        with Script(fresh_lab.client, "hold", fresh_lab.server.ipv4, PORT) as script:
            yield script


def ask_all(clients: Script, command: str) -> None:
    answer = clients.ask(command)
    assert answer["errors"] == {}


def serve_all(clients: Script) -> None:
    """50 connections from beginning to end, each with the right bytes."""
    for command in (f"open {CLIENTS}", f"echo {SIZE}", "close"):
        ask_all(clients, command)


def check_intercepted(lab: Lab, line: Line) -> None:
    assert line["orig_dst"] == f"{lab.server.ipv4}:{PORT}"
    assert line["client"].startswith(f"{lab.client.ipv4}:")


def is_closed(line: Line) -> bool:
    return line["message"] == "connection closed"


def is_about_drops(line: Line) -> bool:
    return line["message"] == "log records dropped"


def accounted_for(lines: list[Line]) -> int:
    """How many records are in the log or counted as lost."""
    drops = [line for line in lines if is_about_drops(line)]
    return len(lines) - len(drops) + sum(line["dropped"] for line in drops)


def check_drops(lines: list[Line], made: int) -> None:
    """Records were dropped, and every record that was made is in the log or counted, none both."""
    reports = [line for line in lines if is_about_drops(line)]
    assert reports, "no line about dropped records"
    print(f"{made} records made, {reports[-1]['dropped_total']} dropped")
    # Only one of the two has lost any: the worker, if nobody reads, or the supervisor, if nothing can be written.
    assert sum(line["dropped"] for line in reports) == reports[-1]["dropped_total"] > 0
    assert accounted_for(lines) == made


def seen_by_server(lab: Lab) -> str:
    """Whose address a server sees of a new connection: for relays whose log cannot be asked."""
    port = PORT + 1
    lab.intercept((PORT, port))
    with lab.server.listen(port) as listener, lab.client.connect(lab.server.ipv4, port):
        listener.settimeout(5)
        server, peer = listener.accept()
        server.close()
    return str(peer[0])


def check_idle(relay: RelayProcess) -> None:
    """Neither of its processes spins over its log."""
    before, began = cpu_seconds_of(relay), time.monotonic()
    select.select([], [], [], QUIET)  # the measure itself takes its time
    busy = (cpu_seconds_of(relay) - before) / (time.monotonic() - began)
    assert busy < 0.1, f"{busy:.0%} of a processor"


def cpu_seconds_of(relay: RelayProcess) -> float:
    """User and system time so far of the supervisor and its workers (proc(5), stat fields 4, 14 and 15)."""
    ticks = workers = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if relay.pid in (int(stat.parent.name), int(fields[1])):
                ticks += int(fields[11]) + int(fields[12])
                workers += int(fields[1]) == relay.pid
    assert workers == 1
    return ticks / os.sysconf("SC_CLK_TCK")


# --- a pipe


@pytest.mark.row("H15", "nobody reads the log", "50 of 50 finish; what is missing is counted")
def test_nobody_reads_the_log(fresh_lab: Lab, clients: Script, pipe: Pipe, seen: Seen) -> None:
    """50 connections while the queue runs over; then the pipe is read: what is not there was counted."""
    lab = fresh_lab
    passers_by = QUEUE_LENGTH // 2 + 3000  # the supervisor, too, holds some lines: a MiB
    with lab.relay_process(wrapper=pipe.wrapper) as relay:
        ask_all(clients, f"open {CLIENTS}")
        ask_all(clients, "echo 64")
        answer = come_and_go(lab.client, lab.server.ipv4, PORT, passers_by)
        assert (answer["done"], answer["errors"]) == (passers_by, {})
        ask_all(clients, f"echo {SIZE}")
        ask_all(clients, "close")

        # Each connection has two lines at the debug level.
        pipe.read_until_accounted_for(AT_START + 2 * (passers_by + CLIENTS))
        serve_all(clients)
        made = AT_START + 2 * (passers_by + 2 * CLIENTS) + AT_END
        pipe.read_until_accounted_for(made - AT_END)
        relay.terminate()
        pipe.read_all()
        assert relay.wait() == 0

    opened = [line for line in pipe.lines if line["message"] == "connection open"]
    for line in opened[:CLIENTS]:
        check_intercepted(lab, line)
    stopped = pipe.lines[-1]
    assert stopped["message"] == "stopped"
    assert stopped["accepted"] == stopped["closed"]["completed"] == passers_by + 2 * CLIENTS
    check_drops(pipe.lines, made)
    seen("50 of 50; every line accounted for")


def test_the_relay_stops_though_nobody_reads_its_log(fresh_lab: Lab, clients: Script, pipe: Pipe) -> None:
    with fresh_lab.relay_process(wrapper=pipe.wrapper) as relay:
        ask_all(clients, "open 1")
        ask_all(clients, "close")
        check_intercepted(fresh_lab, pipe.read_until(is_closed))
        serve_all(clients)  # a hundred lines, of which the pipe holds ten
        began = time.monotonic()
        relay.stop()
        assert time.monotonic() - began < 4
    pipe.read_what_is_there()
    assert pipe.lines[-1]["message"] != "stopped", "there was room for all of it"


@pytest.mark.row("H16", "the reader of the log is gone", "50 of 50 finish; the relay lives")
def test_the_reader_of_the_log_is_gone(fresh_lab: Lab, clients: Script, pipe: Pipe, seen: Seen) -> None:
    with fresh_lab.relay_process(wrapper=pipe.wrapper) as relay:
        ask_all(clients, "open 1")
        ask_all(clients, "close")
        check_intercepted(fresh_lab, pipe.read_until(is_closed))
        pipe.close()
        serve_all(clients)
        check_idle(relay)
        serve_all(clients)
        relay.stop()
    seen("50 of 50, twice")


# --- a file


def test_the_log_file_takes_nothing(fresh_lab: Lab, clients: Script) -> None:
    """/dev/full: every write fails with ENOSPC."""
    with fresh_lab.relay_process("--log-file", "/dev/full") as relay:
        assert seen_by_server(fresh_lab) == fresh_lab.relay_address(), "not intercepted"
        serve_all(clients)
        check_idle(relay)
        serve_all(clients)
        relay.stop()
        assert relay.log == "", "noise on standard error"


@pytest.mark.row("H14", "the disk of the log is full", "relaying goes on; drops counted; no noise")
def test_the_disk_of_the_log_file_is_full(
    fresh_lab: Lab, clients: Script, tmp_path: Path, require_or_skip: Callable[[str], NoReturn], seen: Seen
) -> None:
    """A file system of 192 KiB of the relay's own; later there is room again, also for lines that still wait then."""
    lab = fresh_lab
    mount = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=192k none "$0" && exec "$@"', str(tmp_path))
    tried = lab.relay.run([*mount, "true"], check=False)
    if tried.returncode:
        require_or_skip(f"no mount namespace with a tmpfs: {tried.stderr.strip()}")
    with lab.relay_process("--log-file", str(tmp_path / "log"), wrapper=mount) as relay:
        log = Path(f"/proc/{relay.pid}/root{tmp_path}/log")
        ask_all(clients, "open 1")
        ask_all(clients, "close")
        wait_until(lambda: any(map(is_closed, read_log(log))), "a record is in the log")
        check_intercepted(lab, read_log(log)[-1])
        ballast = log.with_name("ballast")
        ballast.write_bytes(bytes(168 * 1024))
        serve_all(clients)  # some 30 KiB of log
        serve_all(clients)
        wait_until(lambda: log.stat().st_size == 24 * 1024, "the disk is full")
        assert not (tmp_path / "log").exists(), "the file is not on the full disk"
        check_idle(relay)
        serve_all(clients)

        ballast.unlink()
        ask_all(clients, "open 1")
        ask_all(clients, "close")
        made = AT_START + 2 * (1 + 3 * CLIENTS + 1)
        wait_until(
            lambda: accounted_for(read_log(log)) >= made,
            "every line is in the log, or counted there as lost",
            DROP_REPORT_INTERVAL + PATIENCE,
        )
        lines = read_log(log)
        check_drops(lines, made)
        relay.stop()
        assert relay.log == "", "noise on standard error"
    seen("goes on; every line accounted for")


def read_log(path: Path) -> list[Line]:
    """Its whole lines."""
    *whole, _ = path.read_text().split("\n")
    return [json.loads(line) for line in whole]
