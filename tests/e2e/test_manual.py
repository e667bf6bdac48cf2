"""The manual as its readers get it: man pages that render without a warning, every option where it is looked for."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import NoReturn

import pytest

from tproxy_relay.cli import run
from tproxy_relay.config import loader, manual, reference
from tproxy_relay.config.options import ACTION, COMMAND, OPTIONS, POSITIONAL, PREFIX, Option

ROOT = Path(__file__).parents[2]
PAGES = {
    "tproxy-relay.8": "tproxy-relay - transparent TCP relay for Linux",
    "tproxy-relay.conf.5": "tproxy-relay.conf - settings of tproxy-relay",
}
BY_SPHINX = re.compile(r"WARNING: skipping paragraph macro: sp after S[HS]$")
"""Sphinx puts .sp before every paragraph, also before the first of a section. It does nothing there."""

Require = Callable[[str], NoReturn]


def build(kind: str, to: Path, require_or_skip: Require) -> Path:
    if importlib.util.find_spec("sphinx") is None:
        require_or_skip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", kind, "-d", to / "read", ROOT / "docs", to / kind]
    built = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return to / kind


@pytest.fixture(scope="session")
def man(tmp_path_factory: pytest.TempPathFactory, require_or_skip: Require) -> Path:
    """The folder of the man pages."""
    return build("man", tmp_path_factory.mktemp("man"), require_or_skip)


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory, require_or_skip: Require) -> Path:
    """The folder of the HTML pages."""
    return build("html", tmp_path_factory.mktemp("html"), require_or_skip)


def rendered(page: Path, width: int, require_or_skip: Require) -> str:
    """As man shows it. It must have nothing to complain about."""
    if not shutil.which("man"):
        require_or_skip("man")
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": str(width)}
    command = ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", str(page)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=True)
    assert done.stderr == ""
    return re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)


@pytest.fixture(scope="session")
def text(man: Path, require_or_skip: Require) -> dict[str, str]:
    """What a terminal of 80 columns shows of each page."""
    return {name: rendered(man / name, 80, require_or_skip) for name in PAGES}


def section(page: str, title: str) -> str:
    found = re.search(rf"^{title}\n(.*?)^(?=\S)", page, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def test_these_are_the_pages(man: Path) -> None:
    assert {path.name for path in man.iterdir()} == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [80, 120])
def test_a_page_fits_the_terminal(man: Path, name: str, width: int, require_or_skip: Require) -> None:
    lines = rendered(man / name, width, require_or_skip).splitlines()
    assert len(lines) > 100
    assert not [line for line in lines if len(line) > width]
    assert not [line for line in lines if line.endswith("‐")], "no name is divided"


@pytest.mark.parametrize("name", PAGES)
def test_mandoc_finds_nothing(man: Path, name: str, require_or_skip: Require) -> None:
    if not shutil.which("mandoc"):
        require_or_skip("mandoc")
    command = ["mandoc", "-Tlint", "-W", "warning", str(man / name)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout
    assert not [line for line in found.splitlines() if not BY_SPHINX.search(line)]


@pytest.mark.parametrize("name, says", PAGES.items())
def test_apropos_can_read_the_name(man: Path, name: str, says: str, require_or_skip: Require) -> None:
    if not shutil.which("lexgrog"):
        require_or_skip("lexgrog")
    done = subprocess.run(["lexgrog", man / name], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == f'{man / name}: "{says}"'


def test_the_sections_are_those_that_are_looked_for(text: dict[str, str]) -> None:
    found = re.findall(r"^[A-Z][A-Z ]+$", text["tproxy-relay.8"], re.MULTILINE)
    wanted = "NAME SYNOPSIS DESCRIPTION COMMANDS OPTIONS SIGNALS EXIT-STATUS ENVIRONMENT FILES EXAMPLES NOTES SEE-ALSO"
    # Some versions of Sphinx write the heading of its own last section in capitals.
    assert [title for title in found if title != "COPYRIGHT"] == [title.replace("-", " ") for title in wanted.split()]


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_every_option_is_everywhere(option: Option, text: dict[str, str]) -> None:
    in_help, in_page, in_settings, in_conf = places(option)
    assert re.search(in_help, reference.help_text(), re.MULTILINE)
    assert re.search(in_page, text["tproxy-relay.8"], re.MULTILINE)
    # What a file cannot set stands neither in the page on the file nor in the file.
    assert (
        bool(re.search(in_settings, section(text["tproxy-relay.conf.5"], "SETTINGS"), re.MULTILINE)) == option.in_file
    )
    conf = (ROOT / "etc" / "tproxy-relay.conf").read_text(encoding="utf-8")
    assert bool(re.search(in_conf, conf, re.MULTILINE)) == option.in_file


def places(option: Option) -> tuple[str, str, str, str]:
    """How it stands in --help, in tproxy-relay(8), in tproxy-relay.conf(5) and in the configuration file."""
    name, metavar = option.name, f" {option.metavar}".rstrip()
    if option in POSITIONAL:
        return rf"^  {name}$", rf"\b{option.words[-1]}\b", rf"^ +{name} ", rf"^#?{name} ="
    return rf"^  --{name}{metavar}$", rf"^ +--{name}{metavar}\b", rf"^ +{name}{metavar}$", rf"^#?{name} ="


def test_every_command_is_in_synopsis_and_commands(text: dict[str, str]) -> None:
    page = text["tproxy-relay.8"]
    synopsis = section(page, "SYNOPSIS")
    assert re.findall(r"tproxy-relay \[?(\w+)", synopsis) == list(COMMAND.words)
    assert f"rules {{{' | '.join(ACTION.words)}}} [options]" in synopsis
    described = re.findall(r"^ +([a-z]+)(?: \(the default\)| +[A-Z].*)?$", section(page, "COMMANDS"), re.MULTILINE)
    assert {*COMMAND.words, *ACTION.words} <= set(described)


def test_signals_and_exit_codes(text: dict[str, str]) -> None:
    page = text["tproxy-relay.8"]
    signals = re.findall(r"^ +(SIG[A-Z0-9]+)\b", section(page, "SIGNALS"), re.MULTILINE)
    assert sorted(signals) == sorted(number.name for number in run.SIGNALS)
    codes = re.findall(r"^ {7}(\d+) +[A-Z]", section(page, "EXIT STATUS"), re.MULTILINE)
    assert [int(code) for code in codes] == [code for code, _ in manual.exit_codes()]


def test_files_and_variables_are_the_programs(text: dict[str, str]) -> None:
    init = (ROOT / "etc" / "init.d" / "tproxy-relay").read_text(encoding="utf-8")
    init = init.replace("$NAME", "tproxy-relay").replace("$RUNDIR", "/run/tproxy-relay")
    known = "".join([init, (ROOT / "etc" / "default" / "tproxy-relay").read_text(encoding="utf-8")])
    files = re.findall(r"^ +(/\S+)$", section(text["tproxy-relay.8"], "FILES"), re.MULTILINE)
    assert len(files) == 4 and not [path for path in files if path not in known]

    read = {variable for option in OPTIONS.values() for variable in option.variables}
    systemd = (ROOT / "tproxy_relay" / "system" / "systemd.py").read_text(encoding="utf-8")
    read |= set(re.findall(r'"([A-Z_]+)"', systemd))
    named = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", section(text["tproxy-relay.8"], "ENVIRONMENT")))
    assert named - {f"{PREFIX}NAME"} <= read and "LISTEN_FDS" in named


def test_the_examples_are_commands_that_the_program_takes(text: dict[str, str], tmp_path: Path) -> None:
    page = text["tproxy-relay.8"]
    (tmp_path / "conf").write_text("intercept-inbound = 8080\n")  # without any, rules status is refused
    lines = re.findall(r"^ {10}(?:timeout \d+ )?tproxy-relay (.*)$", page, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        loader.load([*shlex.split(line), "--config", str(tmp_path / "conf")], {})


class Links(HTMLParser):
    """The pages that a page leads to, and whether it says that it fits a small screen."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.pages: set[str] = set()
        self.fits = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fits = self.fits or given.get("name") == "viewport"
        if tag == "a" and ":" not in (to := (given.get("href") or "").partition("#")[0]):
            self.pages.add(to)


def reachable(html: Path) -> Iterator[str]:
    known, todo = set(), ["index.html"]
    while todo:
        if (page := todo.pop()) and page not in known:
            known.add(page)
            yield page
            todo += Links(html / page).pages


@pytest.mark.slow
def test_every_html_page_can_be_reached_and_fits_a_phone(html: Path) -> None:
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.rst")} <= set(reachable(html))
    assert all(Links(page).fits for page in html.glob("*.html"))


@pytest.mark.slow
def test_html_has_every_option_with_a_link_to_it(html: Path) -> None:
    command = (html / "command.html").read_text(encoding="utf-8")
    settings = (html / "configuration.html").read_text(encoding="utf-8")
    for name, option in OPTIONS.items():
        assert f'id="cmdoption-{name}"' in command or option in POSITIONAL, name
        assert f">{name}<" in settings or not option.in_file, name
