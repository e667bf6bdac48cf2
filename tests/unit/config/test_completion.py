"""The files for bash and zsh know every option, every word and what completes a value. Shells try them in e2e."""

import re
import shutil
import subprocess
from collections.abc import Callable
from typing import NoReturn

import pytest

from tproxy_relay.config import completion
from tproxy_relay.config.options import ACTION, COMMAND, OPTIONS, POSITIONAL

LONG = [name for name, option in OPTIONS.items() if option not in POSITIONAL]
WITH_WORDS = [name for name in LONG if OPTIONS[name].words]


def test_bash_knows_every_option_and_every_word() -> None:
    words = set(re.findall(r"[\w-]+", completion.bash()))
    assert {f"--{name}" for name in LONG} | set(COMMAND.words) | set(ACTION.words) <= words


@pytest.mark.parametrize("name", LONG)
def test_zsh_knows_every_option(name: str) -> None:
    assert re.search(rf"--{name}\b", completion.zsh())


@pytest.mark.parametrize("name", WITH_WORDS)
def test_both_complete_the_words_of_an_option(name: str) -> None:
    words = OPTIONS[name].words
    assert f"{name}) _tproxy_relay_words {' '.join(words)} ;;" in completion.bash()
    [line] = [line for line in completion.zsh().splitlines() if f"--{name}=" in line]
    assert all(re.search(rf"\b{re.escape(word)}\b", line) for word in words)


@pytest.mark.parametrize(
    ("name", "bash", "zsh"),
    [
        ("config", "compopt -o default", ":_files'"),
        ("root", "compopt -o dirnames", ":_files -/'"),
        ("user", "compgen -u", ":_users'"),
        ("interface", "/sys/class/net", ":_net_interfaces'"),
    ],
)
def test_what_this_host_knows_is_asked_of_it(name: str, bash: str, zsh: str) -> None:
    [value] = [line for line in completion.bash().splitlines() if line.startswith(f"        {name}) ")]
    assert bash in value
    [option] = [line for line in completion.zsh().splitlines() if f"--{name}=" in line]
    assert zsh in option


def test_bash_takes_the_file(require_or_skip: Callable[[str], NoReturn]) -> None:
    if shutil.which("bash") is None:
        require_or_skip("there is no bash")
    assert subprocess.run(["bash", "-n"], input=completion.bash(), text=True, capture_output=True).stderr == ""
