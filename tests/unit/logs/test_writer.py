"""What a line looks like, and that no state of the log's reader reaches those who write to it."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import children
import lines
import pytest
from deadlines import PATIENCE, wait_until
from rows import Seen

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs import writer as logs
from tproxy_relay.logs.writer import ConsoleFormatter, LineFormatter, LogWriter
from tproxy_relay.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

log = logging.getLogger("tproxy_relay.test")


def line(message: str, **fields: object) -> str:
    """A record in the console form, without its time and level."""
    record = logging.makeLogRecord({"msg": message, "levelname": "INFO", **fields})
    text = ConsoleFormatter().format(record)
    _time, _level, rest = text.split(" ", 2)
    return rest


def test_a_note_is_what_logging_makes_of_it() -> None:
    fields = {"id": "a", "bytes_up": 5, "error": None}
    with lines.collected() as collected:
        log.info("connection closed", extra=fields)
        logs.note(log, logging.INFO, "connection closed", fields)
        log.setLevel(logging.WARNING)
        logs.note(log, logging.INFO, "not wanted", fields)
        log.setLevel(logging.NOTSET)
    usual, ours = map(vars, collected.records)
    about_the_place = {"created", "msecs", "relativeCreated", "thread", "threadName", "process", "processName"}
    about_the_place |= {"pathname", "filename", "module", "lineno", "funcName"}
    assert usual.keys() == ours.keys()
    assert {name for name, value in usual.items() if ours[name] != value} <= about_the_place
    assert 0 <= ours["created"] - usual["created"] < PATIENCE
    assert ours["msecs"] == pytest.approx(ours["created"] % 1 * 1000, abs=1)


# --- the JSON form


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"id": "a", "n": 5, "f": 0.1, "none": None, "yes": True, "list": [1, "x"], "map": {"a": 1}},
        {"text": 'grün "\\\n\u2028\x1b\ud800'},
        {"created": 1795555445.0},
        {"when": datetime(2026, 11, 24), "path": Path("/x"), "bytes": b"x", "what": object},
        {"msg": "%s of %s", "args": ("a", 1)},
        {"exc_info": (ValueError, ValueError("first\nsecond"), None)},
        {"stack_info": "a\nb"},
    ],
)  # fmt: skip
def test_a_json_line_is_what_the_library_makes_of_it(more: dict[str, object]) -> None:
    record = logging.makeLogRecord({"msg": "a line", "levelname": "INFO", "created": 1795555445.678, **more})
    text = LineFormatter().format(record)
    assert text == super(LineFormatter, LineFormatter()).format(record)
    assert len(text.splitlines()) == 1 and isinstance(json.loads(text), dict)


# --- the console form


def test_a_line() -> None:
    record = logging.makeLogRecord(
        {"msg": "connection closed", "levelname": "INFO", "created": 1795555445.678, "msecs": 678.0, "id": "a", "n": 5}
    )
    assert ConsoleFormatter().format(record) == "2026-11-24T21:24:05.678Z INFO connection closed id=a n=5"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("plain", "plain"),
        ("", '""'),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "no"', '"say \\"no\\""'),
        ("back\\slash", "back\\slash"),
        ("new\nline", '"new\\nline"'),
        ("return\r", '"return\\r"'),
        ("\x1b[31mred", '"\\u001b[31mred"'),
        ("\x7f", '"\\x7f"'),
        ("\x85", '"\\x85"'),
        ("\u2028", '"\\u2028"'),
        ("\u202e", '"\\u202e"'),
        ("\udc80", '"\\udc80"'),
        ("grün", "grün"),
        (True, "true"),
        (None, "null"),
        (1.5, "1.5"),
        ({"completed": 3}, '{"completed": 3}'),
    ],
)
def test_a_value(value: object, shown: str) -> None:
    assert line("m", field=value) == f"m field={shown}"


@pytest.mark.row("S11", "control characters in names", "one physical line")
def test_every_character_stays_on_one_line_and_off_the_terminal(seen: Seen) -> None:
    every = "".join(map(chr, range(0x3000))) + "\ud800\udfff\U000e0001\U0010ffff"
    text = line(every, field=every)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    seen("one line")


def test_a_value_cannot_forge_a_field() -> None:
    assert line("m", host='x" outcome="completed') == 'm host="x\\" outcome=\\"completed"'


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        text = line("a bug", exc_info=sys.exc_info())
    assert len(text.splitlines()) == 1
    assert 'traceback="Traceback (most recent call last):\\n' in text
    assert "ValueError: first\\nsecond" in text


# --- a writer in this process


@pytest.fixture(autouse=True)
def root_logger_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


class Writing:
    """A LogWriter on a file, between start and stop."""

    def __init__(self, path: Path | str, log_format: str = "json", log_level: str = "info") -> None:
        self.path = Path(path)
        self.writer = LogWriter(Settings(log_file=str(path), log_format=log_format, log_level=log_level), None)
        self.writer.start()

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.writer.stop(PATIENCE)
        self.writer._sink.close()

    def await_stuck(self) -> None:
        """The writer waits for whoever reads the log; it has taken from the queue what it will."""
        thread = self.writer._thread.ident
        assert thread is not None
        wait_until(lambda: sys._current_frames()[thread].f_code.co_name == "write", "the writer writes")

    def text(self) -> str:
        """What is in the file."""
        return self.path.read_text(encoding="utf-8")

    def lines(self) -> list[dict[str, object]]:
        """The JSON lines in the file."""
        return [json.loads(one) for one in self.text().splitlines()]


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


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    with Writing(tmp_path / "log") as writing:
        log.info("before")
        wait_until(lambda: len(writing.lines()) == 1, "it is written")
        (tmp_path / "log").rename(tmp_path / "log.1")
        log.info("after")
        wait_until(lambda: writing.path.exists() and writing.text(), "it is written")
        assert [one["message"] for one in writing.lines()] == ["after"]
        assert "before" in (tmp_path / "log.1").read_text()


def test_a_file_is_added_to(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("{}\n")
    with Writing(tmp_path / "log") as writing:
        log.info("more")
        writing.writer.stop(PATIENCE)
        assert len(writing.lines()) == 2


def test_a_file_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SystemRefusedError, match="cannot write log file .*/no/log: No such file or") as caught:
        LogWriter(Settings(log_file=str(tmp_path / "no" / "log")), None)
    assert caught.value.exit_code == 71


def test_a_full_disk_is_counted_and_not_complained_of(capfd: pytest.CaptureFixture[str]) -> None:
    with Writing("/dev/full") as writing:
        for _ in range(100):
            log.info("lost")
        wait_until(lambda: writing.writer.dropped == 100, "all are counted")
        writing.writer.stop(PATIENCE)
        assert writing.writer.dropped == 100
    assert capfd.readouterr() == ("", "")


# --- a reader that is stuck


class Stuck:
    """A named pipe as log file, whose reader is us, who do not read until told to."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._path = path

    def fill(self) -> None:
        """Nothing fits in any more."""
        writer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
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
    monkeypatch.setattr(logs, "QUEUE_LENGTH", 50)
    monkeypatch.setattr(logs, "DROP_REPORT_INTERVAL", 0.1)
    with Writing(stuck._path) as writing:
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
    with Writing(stuck._path) as writing:
        stuck.fill()
        for _ in range(100):
            log.info("line")
        began = time.monotonic()
        writing.writer.stop(0.2)
        assert time.monotonic() - began < 1
        stuck.read()
        wait_until(lambda: not writing.writer._thread.is_alive() or stuck.read() is None, "the writer ends")


def test_callers_do_not_wait_for_each_other(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "QUEUE_LENGTH", 10)
    with Writing(stuck._path) as writing:
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
        wait_until(lambda: writing.writer._records.empty() or stuck.read() is None, "the queue empties")
        stuck.read()


def test_a_line_that_is_half_out_is_finished_before_the_next() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)  # so that a write takes what fits
    stream = logs._Unbuffered(writer)
    first, second = b"1" * 200_000 + b"\n", b"2\n"
    stream.write(first)
    got = b""
    with pytest.raises(BlockingIOError):
        stream.write(b"lost\n")
    for _ in range(100):
        try:
            got += os.read(reader, 1 << 16)
        except BlockingIOError:
            break
        try:
            stream.write(second)
        except BlockingIOError:
            continue  # still the first
    assert got.rstrip(b"2\n") == first.rstrip(b"\n")
    assert set(got.decode().split("\n")[1:]) == {"2", ""}
    stream.close()
    os.close(reader)


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


TO_STREAM = """
import logging, os, sys
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.settings import Settings

writer = LogWriter(Settings(log_file=sys.argv[1], log_format="json"), None)
writer.start()
logging.getLogger("x").info("a line")
writer.stop(5)
os._exit(writer.dropped)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_standard_stream_as_file(stream: str) -> None:
    """Some engines give their containers a socket, which no open(2) opens."""
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    with ours, theirs:
        command = [sys.executable, "-c", TO_STREAM, f"/dev/{stream}"]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: theirs.fileno()}
        done = subprocess.run(command, env=children.environment(), check=False, timeout=20, **streams)
        assert done.returncode == 0
        assert json.loads(ours.recv(1000))["message"] == "a line"


def test_a_standard_stream_that_is_not_there(tmp_path: Path) -> None:
    code = TO_STREAM.replace("writer = ", "import socket\nsocket.socketpair()\nwriter = ")
    ran = children.run_python(code, "/dev/stdout", prefix=("sh", "-c", 'exec "$@" >&-', "sh"))
    assert ran.returncode == 1
    assert "SystemRefusedError: cannot write log file /dev/stdout" in ran.stderr


def test_a_file_that_cannot_be_opened_again_is_opened_when_it_can(tmp_path: Path) -> None:
    """logrotate, or an operator, takes the folder away for a while."""
    folder = tmp_path / "log"
    folder.mkdir()
    with Writing(folder / "relay.log") as writing:
        log.info("before")
        wait_until(lambda: "before" in writing.text(), "it is written")
        folder.rename(tmp_path / "gone")
        log.info("meanwhile")
        wait_until(lambda: writing.writer.dropped, "it is counted")
        folder.mkdir()

        def again() -> bool:
            log.info("after")
            return writing.path.exists() and "after" in writing.text()

        wait_until(again, "the file is there again")


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


def test_lines_of_workers_are_counted_while_the_file_cannot_be_opened(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with Writing(folder / "log") as writing:
        writing.writer.pass_on(b"one\n")
        wait_until(lambda: (folder / "log").read_bytes() == b"one\n", "it is written")
        shutil.rmtree(folder)
        for _ in range(3):
            writing.writer.pass_on(b"lost\nlost, too\n")
        wait_until(lambda: writing.writer.dropped == 6, "all are counted")
        folder.mkdir()
        writing.writer.pass_on(b"two\n")
        wait_until(lambda: (folder / "log").exists() and b"two\n" in (folder / "log").read_bytes(), "it goes on")
