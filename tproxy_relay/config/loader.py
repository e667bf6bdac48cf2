"""From command line, environment and file to one ``Settings`` and the arguments, with the origin of each value.

The command line wins over the environment, the environment over the file, the file over the defaults.
ConfigArgParse merges them; what reaches it has been checked source by source before, because it would let
typos and duplicates pass and could not say where a bad value stood. Nothing here ends the process but
--help and --version.
"""

import re
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import configargparse  # type: ignore[import-untyped, unused-ignore]

import tproxy_relay
from tproxy_relay.config import conf_file, conflicts, environment, reference
from tproxy_relay.config.conf_file import Given, label
from tproxy_relay.config.option_types import BadValue, shown
from tproxy_relay.config.options import (
    ACTION,
    ARGUMENTS,
    COMMAND,
    DEFAULT_FILE,
    OPTIONS,
    POSITIONAL,
    Option,
    did_you_mean,
)
from tproxy_relay.errors import ConfigError, UsageError
from tproxy_relay.settings import Settings


@dataclass(frozen=True)
class Loaded:
    """The settings and the arguments, and what an operator may ask about them."""

    settings: Settings
    arguments: Mapping[str, Any]
    """A value for each of options.ARGUMENTS."""
    origins: Mapping[str, str]
    """By name of the option: 'default', 'command line', 'environment variable X', '/path:LINE'."""
    files_read: tuple[str, ...]
    warnings: tuple[str, ...]
    print_config: bool


def load(argv: Sequence[str], environ: Mapping[str, str], *, default_file: str = DEFAULT_FILE) -> Loaded:
    """Read all sources. Raises UsageError or ConfigError; --help and --version print and SystemExit(0)."""
    parser = _Parser()
    on_command_line = parser.read_command_line(argv)
    in_environment = environment.gather(environ)
    path, text = _read_file(on_command_line, in_environment, default_file)
    in_file = conf_file.parse(text, path)
    values = parser.merge(argv, in_environment, text)
    settings = Settings(**{option.field: value for option, value in values if option.is_setting})
    arguments = {**ARGUMENTS, **{option.field: value for option, value in values if option.is_argument}}
    origins = _origins(on_command_line, in_environment, in_file)
    conflicts.refuse(settings, arguments, origins)
    return Loaded(
        settings,
        arguments,
        origins,
        (path,) if path else (),
        (*_distrusted(path), *environment.warnings(environ), *conflicts.warnings(settings)),
        "print-config" in on_command_line,
    )


def _distrusted(path: str) -> Iterator[str]:
    why = conf_file.distrust(path) if path else None
    if why:
        yield why


def _read_file(
    on_command_line: Mapping[str, Any], in_environment: Mapping[str, Given], default_file: str
) -> tuple[str, str]:
    """Path and text of the file; both '' if nobody named one and the default one does not exist."""
    named: str | None = on_command_line.get("config")
    if named is None and "config" in in_environment:
        named = in_environment["config"].text
    try:
        return named or default_file, conf_file.read(named or default_file)
    except FileNotFoundError as error:
        if named:
            raise ConfigError(f"cannot read {label(named)}: {error.strerror}") from error
        return "", ""


def _origins(
    on_command_line: Mapping[str, Any], in_environment: Mapping[str, Given], in_file: Mapping[str, Given]
) -> dict[str, str]:
    layers = ChainMap(
        {name: "command line" for name in on_command_line},
        {name: given.where for name, given in in_environment.items()},
        {name: given.where for name, given in in_file.items()},
    )
    return {name: layers.get(name, "default") for name, option in OPTIONS.items() if option.has_value}


class _FileSyntax(configargparse.ConfigFileParser):  # type: ignore[misc]
    """Our file syntax in the shape that ConfigArgParse wants."""

    def parse(self, stream: Any) -> dict[str, str]:
        return {name: given.text for name, given in conf_file.parse(stream.read(), "").items()}


class _Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """The table of options as a parser that raises instead of ending the process."""

    def __init__(self) -> None:
        super().__init__(prog="tproxy-relay", add_help=False, allow_abbrev=False, config_file_parser_class=_FileSyntax)
        for word in POSITIONAL:
            self.add_argument(word.name, nargs="?", type=word.kind and word.kind.parse)
        for option in OPTIONS.values():
            if option not in POSITIONAL:
                # Both spellings for each: a file or variable can set only what has one with two dashes.
                self.add_argument(
                    *_spellings(option),
                    dest=option.name,
                    default=configargparse.SUPPRESS,
                    **_how_to_take(option),
                )

    def read_command_line(self, argv: Sequence[str]) -> dict[str, Any]:
        """What stands on the command line itself, by name of the option."""
        _check_spelling(argv)
        return self._parse(argv, {}, "")

    def merge(
        self, argv: Sequence[str], in_environment: Mapping[str, Given], file_text: str
    ) -> list[tuple[Option, Any]]:
        """The options that any source sets, each with its value. Each source must have been checked before."""
        variables = {OPTIONS[name].variable: given.text for name, given in in_environment.items()}
        return [(OPTIONS[name], value) for name, value in self._parse(argv, variables, file_text).items()]

    def _parse(self, argv: Sequence[str], variables: Mapping[str, str], file_text: str) -> dict[str, Any]:
        namespace, rest = self.parse_known_args(list(argv), env_vars=variables, config_file_contents=file_text)
        given = vars(namespace)
        if rest and given.get(COMMAND.name) and given.get(ACTION.name) is None:
            given[ACTION.name] = _late_action(rest.pop(0))
        if rest:
            raise UsageError(f"unexpected argument {shown(rest[0])}")
        return {name: value for name, value in given.items() if value is not None or OPTIONS[name] not in POSITIONAL}

    def error(self, message: str) -> NoReturn:
        # argparse says "argument -ports/--ports: ...".
        raise UsageError(re.sub(r"^argument (?:-[^/\s]+/)*(\S+: )", r"\1", str(message)))

    def format_help(self) -> str:
        return reference.help_text()


def _late_action(word: str) -> object:
    """The second word, when an option stood between: argparse leaves it over (its documentation on intermixed
    arguments says why)."""
    if ACTION.kind is None or word.startswith("-"):
        raise UsageError(f"unexpected argument {shown(word)}")
    try:
        return ACTION.kind.parse(word)
    except BadValue as error:
        raise UsageError(f"unexpected argument {error}") from None


def _spellings(option: Option) -> tuple[str, ...]:
    short = ("-h",) if option.name == "help" else ()
    return (*short, f"-{option.name}", f"--{option.name}")


def _how_to_take(option: Option) -> dict[str, Any]:
    if option.kind:
        return {"type": option.kind.parse, "env_var": option.variable if option.in_environment else None}
    if option.name == "version":
        return {"action": "version", "version": f"tproxy-relay {tproxy_relay.__version__}"}
    return {"action": "help" if option.name == "help" else "store_true"}


def _check_spelling(argv: Sequence[str]) -> None:
    """Refuse what argparse would take for an abbreviation (-p for -ports) or for the command."""
    for word in argv:
        if word == "--":
            return
        spelling, equals, value = word.partition("=")
        if re.match(r"-+[^-\s\d]", word) and " " not in spelling:
            _check_option(spelling, value if equals else None)


def _check_option(spelling: str, value: str | None) -> None:
    option = OPTIONS.get(spelling.lstrip("-"))
    if spelling == "-h":
        return
    if option is None or option in POSITIONAL or spelling not in _spellings(option):
        others = (other for other in OPTIONS.values() if other not in POSITIONAL)
        guess = did_you_mean(spelling.lstrip("-"), others, lambda other: f"--{other.name}")
        raise UsageError(f"unknown option {shown(spelling)}{guess}")
    # Before Python 3.12 argparse drops '--' as a value and then fails over having none.
    if value == "--" and option.kind:
        try:
            option.kind.parse(value)
        except BadValue as error:
            raise UsageError(f"--{option.name}: {error}") from None


def print_config(loaded: Loaded) -> str:
    """The settings in force as a config file, each with its origin."""
    files = map(label, loaded.files_read)
    read = f"Read from {', '.join(files)}." if loaded.files_read else "No configuration file was read."
    return "\n".join([f"# {read}", *_config_lines(loaded), ""])


def _config_lines(loaded: Loaded) -> Iterator[str]:
    for name, origin in loaded.origins.items():
        option = OPTIONS[name]
        value = loaded.arguments[option.field] if option.is_argument else getattr(loaded.settings, option.field)
        text = option.write(value)
        line = f"{name} = {conf_file.quoted(text)}".rstrip()
        # What a file cannot set, and what is not set, stands there as a comment.
        off = "" if text and option.in_file else "# "
        note = f": {option.unset}" if not text else ""
        yield f"{off + line:<36}  # {origin}{note}"
