"""What the demo prints: plain lines of 80 columns, colour only where it is wanted."""

import os
import subprocess
import sys

import children
import pytest

from tproxy_relay.demo import screen

RECORD = {
    "client": "10.81.1.2:40000",
    "orig_dst": "10.81.2.2:8080",
    "source": "address",
    "outcome": "upstream-reset",
    "bytes_up": 1234567,
    "bytes_down": 0,
}


def test_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen.title("1. A title")
    screen.fact("IPv4", "status 200")
    screen.seen_head()
    screen.seen_line("relayed", "10.81.2.2", "10.81.1.2", "the client")
    screen.access_head()
    screen.access_line(RECORD)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["", "1. A title", "     IPv4      status 200"]
    assert all(len(line) <= 80 and line.isascii() for line in lines)
    assert lines[3].index("server saw") == lines[4].index("10.81.1.2"), "columns stand under their names"
    assert lines[6].split() == ["10.81.1.2:40000", "10.81.2.2:8080", "address", "upstream-reset", "1,234,567", "0"]


def test_a_reader_that_has_gone_is_told_apart_from_a_bug() -> None:
    script = "from tproxy_relay.demo import screen\ntry:\n screen.say('x')\nexcept screen.Unread:\n exit(7)"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=children.environment(),
        check=False,
        timeout=60,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (7, b"")
