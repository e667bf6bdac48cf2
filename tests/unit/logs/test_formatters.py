"""What a line looks like, in both forms; and that no text in it can forge another one."""

import json
import logging
import sys
from datetime import datetime
from pathlib import Path

import lines
import pytest
from deadlines import PATIENCE
from rows import Seen

from tproxy_relay.logs import formatters
from tproxy_relay.logs.formatters import ConsoleFormatter, LineFormatter

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
        formatters.note(log, logging.INFO, "connection closed", fields)
        log.setLevel(logging.WARNING)
        formatters.note(log, logging.INFO, "not wanted", fields)
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


@pytest.mark.parametrize(("log_format", "made"), [("json", LineFormatter), ("console", ConsoleFormatter)])
def test_the_form_is_that_of_the_option(log_format: str, made: type[logging.Formatter]) -> None:
    assert type(formatters.formatter(log_format)) is made
