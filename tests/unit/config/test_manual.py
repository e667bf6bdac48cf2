"""The parts of the manual that are made from the table: every option, every word and every exit code is there."""

import re

import pytest

from tproxy_relay import errors
from tproxy_relay.config import manual
from tproxy_relay.config.options import COMMAND, OPTIONS, POSITIONAL, Option


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option not in POSITIONAL])
def test_the_manual_describes_every_option(name: str) -> None:
    assert re.search(rf"^.. option:: --{name}\b", manual.command_line(), re.MULTILINE)
    assert bool(re.search(rf"^``{name}`` \*", manual.page(), re.MULTILINE)) == OPTIONS[name].in_file


@pytest.mark.parametrize("word", POSITIONAL, ids=lambda option: option.name)
def test_the_manual_describes_the_words(word: Option) -> None:
    assert word.explained.keys() == set(word.words)
    for each in word.words:
        assert f"**{each}**" in manual.commands()
        assert f"**{each}**" in manual.synopsis().replace("[", "").replace("]", "")


def test_what_happens_without_a_word_is_said() -> None:
    assert f"**{COMMAND.default}** (the default)" in manual.commands()
    assert f"| **tproxy-relay** [**{COMMAND.default}**] [*options*]" in manual.synopsis().splitlines()


def test_the_manual_has_every_exit_code() -> None:
    codes = [code for code, _ in manual.exit_codes()]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type(errors.RelayError))]
    assert codes == [0, *sorted(kind.exit_code for kind in kinds)]
    assert all(re.search(rf"^{code}\n   \S", manual.exit_status(), re.MULTILINE) for code in codes)
