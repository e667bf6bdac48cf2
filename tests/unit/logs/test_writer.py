"""No state of the log's reader reaches those who write to it, and what they wrote arrives in order."""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import children
import pytest
from deadlines import PATIENCE, wait_until
from log_writers import Writing
from rows import Seen

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs import writer as writer_module
from tproxy_relay.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "root_logger_as_before")

log = logging.getLogger("tproxy_relay.test")


# --- a writer in this process


@pytest.mark.row("S11", "the same as JSON", "parses back equal")
def test_json_lines_give_back_what_went_in(tmp_path: Path, seen: Seen) -> None:
    hostile = 'a\n\x1b[31m\u2028"=\\ \x00 \udc80 ü'
    with Writing(tmp_path / "log") as writing:
        log.info("connection closed", extra={"host": hostile, "n": 5, "x": 1.5, "closed": {"idle": 1}, "no": None})
        log.warning(hostile)
        writing.writer.stop(PATIENCE)
        first, second = writing.lines()
    assert len(writing.text().split("\n")) == 3, "one physical line each, and the end"
    assert first.pop("timestamp")
    assert first == {
        "levelname": "INFO", "name": "tproxy_relay.test", "message": "connection closed",
        "host": hostile, "n": 5, "x": 1.5, "closed": {"idle": 1}, "no": None,
    }  # fmt: skip
    assert (second["message"], second["levelname"]) == (hostile, "WARNING")
    seen("equal")


def test_a_json_traceback_is_a_member(tmp_path: Path) -> None:
    with Writing(tmp_path / "log") as writing:
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            log.error("a bug", exc_info=True)
        writing.writer.stop(PATIENCE)
        (only,) = writing.lines()
    assert "ValueError: first\nsecond" in str(only["exc_info"])


def test_console_lines_in_a_file(tmp_path: Path) -> None:
    with Writing(tmp_path / "log", "console") as writing:
        log.info("connection closed", extra={"host": "ü \udc80"})
        writing.writer.stop(PATIENCE)
        assert writing.text().endswith('Z INFO connection closed host="ü \\udc80"\n')


@pytest.mark.parametrize(("level", "expected"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_the_level(tmp_path: Path, level: str, expected: int) -> None:
    with Writing(tmp_path / "log", log_level=level) as writing:
        log.debug("one")
        log.info("two")
        log.warning("three")
        writing.writer.stop(PATIENCE)
        assert len(writing.lines()) == expected


def test_lines_keep_their_order_and_stop_writes_them_all(tmp_path: Path) -> None:
    with Writing(tmp_path / "log") as writing:
        for number in range(5000):
            log.info("line", extra={"number": number})
        writing.writer.stop(PATIENCE)
        assert [one["number"] for one in writing.lines()] == list(range(5000))
        assert writing.writer.dropped == 0


def test_after_stop_a_line_goes_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not to logging's last resort, which is standard error, unformatted, in the caller's thread."""
    with Writing(tmp_path / "log") as writing:
        writing.writer.stop(PATIENCE)
        log.error("late")
        assert writing.text() == ""
    assert capfd.readouterr() == ("", "")


# --- a reader that is stuck


class Stuck:
    """A named pipe as log file, whose reader is us, who do not read until told to."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.path = path

    def fill(self) -> None:
        """Nothing fits in any more."""
        writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            while True:
                os.write(writer, b"\n" * 4096)
        except BlockingIOError:
            os.close(writer)

    def read(self) -> str:
        """What is in the pipe now."""
        parts = []
        try:
            while part := os.read(self.reader, 1 << 16):
                parts.append(part)
        except BlockingIOError:
            pass  # empty
        return b"".join(parts).decode()


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[Stuck]:
    pipe = Stuck(tmp_path / "pipe")
    yield pipe
    os.close(pipe.reader)


def test_nobody_waits_for_a_stuck_reader_and_what_was_dropped_is_said(
    stuck: Stuck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "QUEUE_LENGTH", 50)
    monkeypatch.setattr(writer_module, "DROP_REPORT_INTERVAL", 0.1)
    with Writing(stuck.path) as writing:
        stuck.fill()
        log.info("this one stops the writer")
        writing.await_stuck()
        slowest = 0.0
        for number in range(1000):
            began = time.monotonic()
            log.info("line", extra={"number": number})
            slowest = max(slowest, time.monotonic() - began)
        assert slowest < 0.2
        assert writing.writer.dropped == 950
        text = ""

        def drained() -> bool:
            nonlocal text
            text += stuck.read()
            return "log records dropped" in text and '"number": 49' in text

        wait_until(drained, "the lines come, and the loss is said")
        log.info("and on it goes")
        said = [json.loads(one) for one in text.split("\n") if one]
        numbers = [one["number"] for one in said if one["message"] == "line"]
        assert numbers == list(range(50)), "the oldest, in order, and no more than the queue holds"
        reports = [one for one in said if one["message"] == "log records dropped"]
        assert sum(one["dropped"] for one in reports) == 950
        assert reports[-1]["dropped_total"] == 950
        assert reports[-1]["levelname"] == "WARNING"
        writing.writer.stop(PATIENCE)
        rest = stuck.read()
        assert rest.count("and on it goes") == 1
        assert "log records dropped" not in rest, "that was said"


def test_stop_does_not_wait_for_a_stuck_reader(stuck: Stuck) -> None:
    with Writing(stuck.path) as writing:
        stuck.fill()
        for _ in range(100):
            log.info("line")
        began = time.monotonic()
        writing.writer.stop(0.2)
        assert time.monotonic() - began < 1
        stuck.read()
        wait_until(lambda: not writing.writer.debug_state()["thread"] or stuck.read() is None, "the writer ends")


def test_callers_do_not_wait_for_each_other(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "QUEUE_LENGTH", 10)
    with Writing(stuck.path) as writing:
        stuck.fill()
        log.info("this one stops the writer")
        writing.await_stuck()

        def write() -> None:
            for _ in range(200):
                log.info("x")

        threads = [threading.Thread(target=write) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert writing.writer.dropped == 20 * 200 - 10, "all but those in the queue"
        stuck.read()
        wait_until(lambda: not writing.writer.debug_state()["waiting"] or stuck.read() is None, "the queue empties")
        stuck.read()


# --- standard error, in a process of its own

WRITE = """
import logging, os, sys, time
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.settings import Settings

writer = LogWriter(Settings(log_format="console"), sys.stderr.fileno() if sys.stderr else None)
writer.start()
print("ready", flush=True)
sys.stdin.readline()
began = time.monotonic()
for number in range(int(sys.argv[1])):
    logging.getLogger("x").info("line %d", number)
slow = time.monotonic() - began
began = time.monotonic()
writer.stop(0.3)
print(writer.dropped, slow < 3, time.monotonic() - began < 2, flush=True)
os._exit(0)
"""


def test_the_reader_of_standard_error_is_gone() -> None:
    with children.running_python(WRITE, "500") as child:
        assert child.stdout and child.stdin and child.stderr
        assert child.stdout.readline() == "ready\n"
        child.stderr.close()
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "500 True True\n"
        assert child.wait(PATIENCE) == 0


def test_standard_error_that_nobody_reads() -> None:
    with children.running_python(WRITE, "30000") as child:
        assert child.stdout and child.stdin and child.stderr
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("\n")
        child.stdin.flush()
        dropped, quick, stopped = child.stdout.readline().split()
        assert (quick, stopped) == ("True", "True")
        assert 10_000 < int(dropped) <= 20_000
        assert child.wait(PATIENCE) == 0
        lines = child.stderr.read().splitlines()
        assert lines[0].endswith("INFO line 0")
        assert "Traceback" not in "".join(lines)


def test_a_process_without_standard_error() -> None:
    """As some service managers and `2>&-` start it."""
    ran = children.run_python(WRITE, "5", prefix=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert ran.stdout.startswith("ready\n")
    assert ran.stdout.endswith("True True\n")


def test_lines_of_workers_stand_between_those_of_the_supervisor(tmp_path: Path) -> None:
    with Writing(tmp_path / "log", log_format="console") as writing:
        logging.getLogger("relay").warning("before")
        writing.writer.pass_on(b"one of a worker\nanother\n")
        logging.getLogger("relay").warning("after")
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [line.rpartition("WARNING ")[2] for line in lines] == ["before", "one of a worker", "another", "after"]


def test_a_reload_may_change_file_form_and_level(tmp_path: Path) -> None:
    with Writing(tmp_path / "old", log_format="console", log_level="warning") as writing:
        logging.getLogger("relay").info("too little")
        logging.getLogger("relay").warning("before")
        writing.writer.change(
            writing.writer.open(Settings(log_file=str(tmp_path / "new"), log_format="json", log_level="info"))
        )
        logging.getLogger("relay").info("after")
    assert (tmp_path / "old").read_text(encoding="utf-8").endswith(" WARNING before\n")
    assert json.loads((tmp_path / "new").read_text(encoding="utf-8"))["message"] == "after"


def test_a_log_that_cannot_be_opened_changes_nothing(tmp_path: Path) -> None:
    with Writing(tmp_path / "log") as writing:
        with pytest.raises(SystemRefusedError, match="cannot write log file"):
            writing.writer.open(Settings(log_file=str(tmp_path / "no" / "log"), log_level="error"))
        logging.getLogger("relay").info("as before")
    assert json.loads((tmp_path / "log").read_text(encoding="utf-8"))["message"] == "as before"
