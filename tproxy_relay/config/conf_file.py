"""The configuration file: which bytes are one, and what each line of it says.

``name = value`` on a line, comments after # or ;, quotes round a value that needs them. Nothing in the
file is skipped: what is not understood is an error with its line number, so that a typo cannot leave a
default in force unseen. Values are checked here too, also those that a stronger source overrides.
"""

import os
import re
import stat
from operator import attrgetter
from typing import BinaryIO, NamedTuple

from tproxy_relay.config.option_types import BadValue, shown
from tproxy_relay.config.options import OPTIONS, did_you_mean
from tproxy_relay.errors import ConfigError

MAX_BYTES = 1024 * 1024

_BLANKS = " \t\r"
_COMMENT = re.compile(r"(?:^|[ \t])[#;]")
_QUOTED = re.compile(r"""(?:"(?P<double>(?:[^"]|"")*)"|'(?P<single>(?:[^']|'')*)')(?:[ \t]+[#;].*)?""")


class Given(NamedTuple):
    """A value as the user wrote it, and where: '/etc/tproxy-relay.conf:7'."""

    text: str
    where: str


def label(path: str) -> str:
    """The path for messages and comments: a name with a newline in it must not make two lines."""
    return path if path.isprintable() else repr(path)


def read(path: str) -> str:
    """The text of the file. Raises FileNotFoundError if there is none, ConfigError if it is not usable."""
    if path == os.devnull:
        return ""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            data = _content(file, path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {label(path)}: {reason}") from error
    return _decoded(data, path)


def distrust(path: str) -> str | None:
    """A sentence about why not to trust the file at this path: any account may write into it. None if there is no
    reason, or no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(found.st_mode) or not found.st_mode & stat.S_IWOTH:
        return None
    return f"{label(path)} can be changed by any account: chmod o-w {label(path)}"


def _open_without_waiting(path: str, flags: int) -> int:
    # Opening a FIFO for reading would wait for a writer, perhaps for ever.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _content(file: BinaryIO, path: str) -> bytes:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ConfigError(f"cannot read {label(path)}: not a regular file")
    data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"cannot read {label(path)}: larger than {MAX_BYTES} bytes")
    return data


def _decoded(data: bytes, path: str) -> str:
    """UTF-8, with or without the byte order mark that some editors write."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{label(path)}:{line}: not UTF-8 text") from error


def parse(text: str, path: str) -> dict[str, Given]:
    """What the text of a file sets, by name of the option. `path` is for messages. Raises ConfigError."""
    given: dict[str, Given] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip(_BLANKS)
        if line and line[0] not in "#;":
            where = f"{label(path)}:{number}"
            name, value = _setting(line, where)
            if name in lines:
                raise ConfigError(f"{where}: {name!r} is already set on line {lines[name]}")
            lines[name] = number
            given[name] = Given(value, where)
    return given


def _setting(line: str, where: str) -> tuple[str, str]:
    name, equals, rest = (part.strip(_BLANKS) for part in line.partition("="))
    if "\0" in line:
        raise ConfigError(f"{where}: a NUL byte, so this is not a text file")
    if line[0] == "[" and not equals:
        raise ConfigError(f"{where}: there are no sections here: remove the line {shown(line)}")
    if not equals:
        raise ConfigError(f"{where}: expected 'name = value', found {shown(line)}")
    _check_name(name, where)
    try:
        value = _unlisted(name, _unquoted(rest))
        _check_value(name, value)
    except BadValue as error:
        raise ConfigError(f"{where}: {name}: {error}") from None
    return name, value


def _check_name(name: str, where: str) -> None:
    option = OPTIONS.get(name)
    if option is None:
        settable = filter(attrgetter("in_file"), OPTIONS.values())
        guess = did_you_mean(name, settable, attrgetter("name"))
        raise ConfigError(f"{where}: unknown setting {shown(name)}{guess}")
    if not option.in_file:
        raise ConfigError(f"{where}: {name!r} is for the command line, not for the file")


def _check_value(name: str, value: str) -> None:
    if not value:
        raise BadValue("no value given; leave the line out for the default")
    kind = OPTIONS[name].kind
    if kind:
        kind.parse(value)


def _unquoted(rest: str) -> str:
    """The value without its quotes and without the comment after it."""
    if rest[:1] not in ('"', "'"):
        return _COMMENT.split(rest, maxsplit=1)[0].rstrip(_BLANKS)
    match = _QUOTED.fullmatch(rest)
    if not match:
        raise BadValue(f"the quotes do not close, or something follows them, in {shown(rest)}")
    if match["double"] is not None:
        return match["double"].replace('""', '"')
    return match["single"].replace("''", "'")


def _unlisted(name: str, value: str) -> str:
    """'[15002, 15006]', as ConfigArgParse writes a list, is '15002, 15006'."""
    if not (OPTIONS[name].many and value.startswith("[") and value.endswith("]")):
        return value
    return ",".join(item.strip(" \t\"'") for item in value[1:-1].split(","))


def quoted(value: str) -> str:
    """The value as it must stand after '=' so that parse() gives it back."""
    bare = value == value.strip(_BLANKS) and value[:1] not in ('"', "'") and not _COMMENT.search(value)
    return value if bare else '"' + value.replace('"', '""') + '"'
