"""The demo's output: plain where nothing can show colours, narrow enough for a terminal, quiet without a reader."""

import subprocess
import sys

import pytest

from tproxy_relay.demo import screen

RECORD = {
    **{"client": "10.81.1.2:45678", "orig_dst": "10.81.2.2:8080", "source": "full", "outcome": "completed"},
    **{"bytes_up": 1_048_576, "bytes_down": 123_456_789_012},
}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9_999_999, "9,999,999"), (10_000_000, "10 MB"), (123_456_789_012, "123,457 MB")],
)
def test_a_count_is_short(number: int, text: str) -> None:
    assert screen.count(number) == text


def test_what_is_no_terminal_gets_plain_text_of_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    screen.title("What it does")
    screen.access_head()
    screen.access_line({**RECORD, "bytes_down": 5})
    screen.seen_head()
    screen.seen_line("preserve-source full", "10.81.2.2", "10.81.1.2", "both hidden")
    screen.fact("rate", "1 Gbit/s")
    screen.remark("so much for that")
    shown = capsys.readouterr().out
    assert "\033" not in shown and all(len(line) <= 80 for line in shown.splitlines())
    assert "  10.81.1.2:45678   10.81.2.2:8080   full    completed      1,048,576         5\n" in shown


def test_a_record_without_a_destination_has_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    screen.access_line({name: value for name, value in RECORD.items() if name != "orig_dst"})
    assert capsys.readouterr().out.split()[1] == "-"


def test_a_reader_that_has_gone_is_one_exception_and_no_complaint() -> None:
    script = "from tproxy_relay.demo import screen\ntry:\n    while True: screen.say('x' * 1000)\n"
    script += "except screen.Unread:\n    raise SystemExit(7)\n"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(20) == 7
