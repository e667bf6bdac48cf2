"""The table of options against Settings and Arguments, and the guesses at mistyped names."""

import dataclasses
import re

import pytest

from tproxy_relay.config.options import ARGUMENTS, GROUPS, OPTIONS, POSITIONAL, Option, did_you_mean
from tproxy_relay.settings import Settings

SETTINGS = [option for option in OPTIONS.values() if option.is_setting]
WITH_VALUE = [option for option in OPTIONS.values() if option.has_value]


def name_of(option: Option) -> str:
    return option.name


def test_each_setting_has_one_option() -> None:
    assert sorted(option.field for option in SETTINGS) == sorted(field.name for field in dataclasses.fields(Settings))


def test_each_argument_has_one_option() -> None:
    assert sorted(option.field for option in WITH_VALUE if option not in SETTINGS) == sorted(ARGUMENTS)
    assert not any(option.is_argument for option in SETTINGS)


def test_no_name_is_there_twice() -> None:
    assert len(OPTIONS) == len(POSITIONAL) + sum(map(len, GROUPS.values()))


@pytest.mark.parametrize("option", [option for option in WITH_VALUE if option.kind and option.default], ids=name_of)
def test_the_default_is_a_value_that_the_option_takes(option: Option) -> None:
    default = ARGUMENTS[option.field] if option.is_argument else getattr(Settings(), option.field)
    assert option.kind and option.kind.parse(option.default) == default


@pytest.mark.parametrize("option", WITH_VALUE, ids=name_of)
def test_an_option_without_a_default_says_what_happens_then(option: Option) -> None:
    assert bool(option.unset) == (option.default == "")


@pytest.mark.parametrize("option", OPTIONS.values(), ids=name_of)
def test_the_meaning_is_sentences_without_markup(option: Option) -> None:
    assert option.meaning.endswith(".")
    assert not re.search(r"[*`|<>\\]|_\b", option.meaning)
    assert bool(option.metavar) == bool(option.kind)


@pytest.mark.parametrize("option", [option for option in OPTIONS.values() if option.words], ids=name_of)
def test_words_are_explained_all_or_none(option: Option) -> None:
    assert set(option.explained) in (set(), {"auto"}, set(option.words))
    assert not any(f" {word}: " in text for word in option.words for text in option.explained.values())


def test_what_only_the_command_line_can_set() -> None:
    assert {name for name, option in OPTIONS.items() if not option.in_file} == {
        "command",
        "action",
        "config",
        "print-config",
        "root",
        "take-over",
        "keep",
        "show",
        "abort",
        "json",
        "version",
        "help",
    }
    assert {name for name, option in OPTIONS.items() if not option.in_environment} == {
        "command",
        "action",
        "print-config",
        "root",
        "take-over",
        "keep",
        "show",
        "abort",
        "json",
        "version",
        "help",
    }


def test_variables() -> None:
    assert OPTIONS["connect-timeout"].variables == ("TPROXY_RELAY_CONNECT_TIMEOUT",)
    assert OPTIONS["log-level"].variables == ("TPROXY_RELAY_LOG_LEVEL", "LOG_LEVEL")
    assert OPTIONS["keep"].variables == ()


@pytest.mark.parametrize(
    "typed, guess",
    [
        ("prots", " (did you mean 'ports'?)"),
        ("port", " (did you mean 'ports'?)"),
        ("PORTS", " (did you mean 'ports'?)"),
        ("connect_timeout", " (did you mean 'connect-timeout'?)"),
        ("xyzzy", ""),
        ("p", ""),
        ("", ""),
        ("ports" * 100_000, ""),
    ],
)
def test_the_nearest_name(typed: str, guess: str) -> None:
    assert did_you_mean(typed, OPTIONS.values(), name_of) == guess
