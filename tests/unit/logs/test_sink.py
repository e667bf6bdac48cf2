"""Where lines go: files that move away, disks that are full, standard streams that are sockets or missing."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import children
import pytest
from deadlines import PATIENCE, wait_until
from log_writers import Writing

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs.sink import Unbuffered
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "root_logger_as_before")

log = logging.getLogger("tproxy_relay.test")


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


def test_a_line_that_is_half_out_is_finished_before_the_next() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)  # so that a write takes what fits
    stream = Unbuffered(writer)
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


# --- standard streams, in a process of its own

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
