"""The pages on interception say what the program does: its commands, its options, the rules that it makes."""

import re
import shlex
import textwrap
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from tproxy_relay.cli import main
from tproxy_relay.config import loader
from tproxy_relay.config.options import OPTIONS
from tproxy_relay.intercept import nft, plan
from tproxy_relay.settings import PortRange, Settings

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
PAGES = ("interception.rst", "cookbook.rst")
EXAMPLE = DOCS / "examples" / "gateway.sh"


def blocks() -> Iterator[tuple[str, str]]:
    """Name and text of every named code block."""
    for page in PAGES:
        for found in re.finditer(r"^( *):name: (\S+)\n\n((?:\1.*\n|\n)+)", (DOCS / page).read_text(), re.MULTILINE):
            yield found[2], textwrap.dedent(found[3])


def commands() -> list[str]:
    """Every command line of the relay on the pages."""
    lines = [line for _, text in blocks() for line in text.splitlines() if "tproxy-relay " in line]
    inline = re.findall(r"``tproxy-relay (rules show --[^`]*)``", "".join((DOCS / page).read_text() for page in PAGES))
    return [line[line.index("tproxy-relay ") + 13 :] for line in lines] + inline


@pytest.mark.parametrize("command", commands())
def test_the_commands_are_accepted(command: str) -> None:
    words = [word for word in shlex.split(command, comments=True) if word != "..."]
    assert loader.load(words, {}, default_file="/dev/null").arguments["command"] == words[0]


@pytest.mark.parametrize("page", PAGES)
def test_the_options_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    named = re.findall(r"``(?:tproxy-relay run )?--([a-z-]+)", text)
    set_to = re.findall(r"``([a-z-]+) = ", text)
    plain = re.findall(r"``([a-z]+(?:-[a-z]+)+)``", text)
    assert {"preserve-source"} <= {*set_to, *plain}
    unknown = {*named, *set_to, *plain} - set(OPTIONS) - {"set-mark"}
    assert not unknown


def test_the_quoted_ruleset_is_what_rules_show_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [line for line in commands() if "--bind" in line]
    assert main.main([*command.split(), "--backend", "nft", "--config", "/dev/null"]) == 0
    shown = capsys.readouterr().out
    assert EXAMPLE.read_text() == shown, f"make it anew: tproxy-relay {command} > {EXAMPLE.relative_to(ROOT)}"


def test_the_explained_rules_are_in_the_quoted_ruleset() -> None:
    page = (DOCS / "interception.rst").read_text()
    explained = re.findall(r"^\S.*: ``(.+)``$", page, re.MULTILINE)
    assert len(explained) >= 4
    for rule in explained:
        assert rule in EXAMPLE.read_text()


def test_the_marks_for_firewalls_are_those_of_the_defaults() -> None:
    bit, mask = plan.of_settings(Settings()).marks.inbound, Settings.mark_mask
    for page in PAGES:
        text = (DOCS / page).read_text()
        assert {*re.findall(r"--mark (\S+?)`* ", text)} - {"1/0x1"} == {f"{bit:#x}/{mask:#x}"}
        assert f"meta mark & {mask:#010x} == {bit:#010x}" in text


def test_rules_for_listeners_on_loopback_are_as_quoted() -> None:
    wanted = plan.of_settings(Settings(bind=("127.0.0.1",), intercept_inbound=(PortRange(8080, 8080),)))
    quoted = re.findall(r"rules say ``(.*?)``", (DOCS / "interception.rst").read_text().replace("\n", " "))
    assert len(quoted) == 1 and quoted[0] in nft.script(wanted, "active")


def test_every_block_is_run_by_a_test() -> None:
    files = ("cookbook", "usual_recipe", "reported_cases")
    tests = "".join((ROOT / "tests" / "e2e" / f"test_{name}.py").read_text() for name in files)
    for name, _ in blocks():
        assert re.search(rf"""["']{name}["']""", tests), name


@pytest.mark.parametrize("topology", ["gateway", "host", "local"])
def test_the_pictures_are_there_and_can_be_read_in_the_dark(topology: str) -> None:
    picture = (DOCS / "images" / f"{topology}.svg").read_text()
    root = xml.etree.ElementTree.fromstring(picture)
    assert root.find("{http://www.w3.org/2000/svg}title") is not None
    assert "prefers-color-scheme: dark" in picture
    assert f"figure:: images/{topology}.svg" in (DOCS / "interception.rst").read_text()
