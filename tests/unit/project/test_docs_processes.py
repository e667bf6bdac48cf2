"""The page on the processes says what the program does: its log lines, signals, capabilities, numbers and commands."""

import ast
import re
import shlex
import signal
import xml.etree.ElementTree
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tproxy_relay import errors
from tproxy_relay.cli import run
from tproxy_relay.config import loader
from tproxy_relay.config.options import OPTIONS
from tproxy_relay.ipc import scoreboard
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import generation, workers
from tproxy_relay.supervisor.respawn import DEATHS_PERIOD, MAX_DEATHS, Deaths
from tproxy_relay.system import limits, privileges, proc_title

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "processes.rst").read_text()
WORDS = " ".join(PAGE.split())
"""The page without its line breaks."""

NAMES = {proc_title.SUPERVISOR, proc_title.WORKER, proc_title.GUARD}
TERMS = {"supervisor", "workers", "guard", "generation", "Nothing"}
"""In italics, and no log lines."""


@cache
def log_lines() -> dict[str, set[str]]:
    """Every message that is logged somewhere, with the names of its fields."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "tproxy_relay").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("log."):
                for message in call.args:
                    if isinstance(message, ast.Constant) and isinstance(message.value, str):
                        found.setdefault(message.value, set()).update(fields_of(call))
    return found


def fields_of(call: ast.Call) -> Iterator[str]:
    for node in ast.walk(call):
        if isinstance(node, ast.Dict):
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant))  # type: ignore[misc]


def section(title: str) -> str:
    """What stands below this heading."""
    found = re.search(rf"^{re.escape(title)}\n-+\n(.*?)(?=^[^\n]+\n--+\n|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def column(text: str) -> list[str]:
    """The first cells of the table with lines of = in it, without the continued ones."""
    return re.findall(r"^([`A-Za-z0-9]\S*(?: \S+)*?)  ", text.partition("\n=")[2], re.MULTILINE)


def test_the_log_lines_that_it_names_are_logged() -> None:
    named = set(re.findall(r"(?<!\*)\*([a-zA-Z][^*]*)\*(?!\*)", WORDS))
    assert {"worker ended", "reload refused", "handed over", "stopped"} <= named
    assert named - TERMS <= set(log_lines())


@pytest.mark.parametrize(
    "line, fields",
    [
        ("worker ended", {"pid", "how", "live"}),
        ("worker stalled", {"pid", "seconds"}),
        ("reloaded", {"changed"}),
        ("reload refused", {"why"}),
    ],
)
def test_the_fields_that_it_names_are_in_the_line(line: str, fields: set[str]) -> None:
    assert fields <= log_lines()[line]
    for field in fields:
        assert f"``{field}``" in PAGE


def test_the_other_lines_of_the_page_on_the_log_are_logged() -> None:
    page = (ROOT / "docs" / "access-log.rst").read_text().partition("Other lines worth knowing")[2]
    named = re.findall(r"``([a-z ]+)``", "\n".join(re.findall(r"^``.*$", page, re.MULTILINE)))
    assert {"listening", "worker ended", "reloaded", "connections", "stopped"} <= set(named)
    reports = {"log records dropped"}  # made by the writer itself
    assert set(named) - reports <= set(log_lines())
    for line in ("listening", "not accepting"):
        for field in log_lines()[line]:
            assert f"``{field}``" in page, field


def test_the_signals_are_those_that_are_caught() -> None:
    assert {signal.Signals[f"SIG{name}"] for name in column(section("Signals"))} == set(run.SIGNALS)


def test_the_capabilities_are_those_that_a_supervisor_keeps() -> None:
    listed = column(section("Privileges"))
    assert tuple(name for cell in listed for name in cell.split(", ")) == privileges.SUPERVISOR


def test_what_needs_a_restart_is_what_no_reload_can_change() -> None:
    row = re.search(r"^needs a restart(.*?); the end of interception", section("Reload"), re.MULTILINE | re.DOTALL)
    assert row
    named = re.findall(r"``([a-z-]+)``", row[1])
    assert named == [name.replace("_", "-") for name in generation.FIXED] == list(generation.fixed(Settings()))


def test_the_numbers_are_those_of_the_program() -> None:
    assert f"{MAX_DEATHS} workers within {DEATHS_PERIOD:g} s" in WORDS
    deaths = Deaths()
    pauses = [deaths.pause(0.0) for _ in range(MAX_DEATHS)]
    assert pauses[0] == 0 and pauses[-1] is None
    assert "at once, then after " + ", ".join(f"{pause:g} s" for pause in pauses[1:-1]) + " " in WORDS
    assert f"room for {scoreboard.SLOTS} workers" in WORDS
    assert "after one more second, for handshakes" in WORDS and workers.HANDSHAKE_GRACE == 1
    assert "less about forty" in WORDS and limits.RESERVED_DESCRIPTORS == 40


def test_the_exit_codes_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type(errors.RelayError))]
    assert {int(code) for code in column(section("Exit codes"))} < {0, *(kind.exit_code for kind in kinds)}


def test_what_the_service_manager_is_told_is_told() -> None:
    files = (path for path in (ROOT / "tproxy_relay" / "supervisor").glob("*.py") if path.name != "launch.py")
    source = "".join(path.read_text() for path in files)
    states = re.findall(r"\b([A-Z_]+=)", "".join(column(section("What the service manager is told"))))
    assert {"READY=", "RELOADING=", "STOPPING=", "WATCHDOG=", "FDSTORE="} <= set(states)
    assert set(states) == set(re.findall(r"\b([A-Z_]+=)", source.replace("\\n", " "))) - {"FDNAME="}


def commands() -> list[str]:
    lines = [line for line in PAGE.splitlines() if re.match(r"   (ExecStart=\S*/)?tproxy-relay ", line)]
    return [line[line.index("tproxy-relay ") + 13 :] for line in lines] + re.findall(r"``tproxy-relay (run.*?)``", PAGE)


@pytest.mark.parametrize("command", commands())
def test_the_commands_are_accepted(command: str) -> None:
    words = shlex.split(command.partition(">")[0], comments=True)
    assert loader.load(words, {}, default_file="/dev/null").arguments["command"] == "run"


def test_the_options_exist() -> None:
    named = set(re.findall(r"``(?:--)?([a-z]+(?:-[a-z]+)*)(?: = \w+)?``", PAGE))
    assert {"workers", "user", "stall-timeout", "drain-timeout", "max-connections"} <= named
    others = {
        "auto",
        "off",
        "closed",
        "setpriv",
        "aborted",
        "no",
        *{field for line in log_lines().values() for field in line},
    }
    assert named - set(OPTIONS) - others - {"run", "kill-whom", *NAMES} == set()


def test_the_names_of_the_processes() -> None:
    assert all(f"``{name}``" in PAGE for name in NAMES)


def test_the_picture_is_there_and_can_be_read_in_the_dark() -> None:
    picture = (ROOT / "docs" / "images" / "processes.svg").read_text()
    root = xml.etree.ElementTree.fromstring(picture)
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert "prefers-color-scheme: dark" in picture
    assert "figure:: images/processes.svg" in PAGE
