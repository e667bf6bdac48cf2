"""Pages of the manual, as far as they are made from the table of options.

``page`` is docs/configuration.rst, the source of tproxy-relay.conf(5). The rest are parts of docs/command.rst, the
source of tproxy-relay(8): docs/conf.py puts them where that page says ``.. part:: NAME``. No relay needs this module.
"""

import textwrap
from collections.abc import Iterator

from tproxy_relay import errors
from tproxy_relay.config.options import ACTION, COMMAND, DEFAULT_FILE, GROUPS, PREFIX, Option

# groff would divide names of options and variables at the end of a line, and stretch lines without that.
_RAGGED = """\
.. raw:: manpage

   .nr HY 0
   .nh
   .ad l"""

_PAGE = f"""\
.. Made by "python -m tproxy_relay.config.reference rst". Change tproxy_relay/config/options.py or
   tproxy_relay/config/manual.py instead of this page.

Configuration
=============

Synopsis
--------

{_RAGGED}

``{DEFAULT_FILE}``

Description
-----------

Every setting has one name, and four places can set it. The first of these that does wins:

1. the command line,
2. the environment,
3. the configuration file,
4. the default.

``tproxy-relay --print-config`` prints every setting and where its value came from. What it prints is
itself a configuration file, so it can be kept and given back with ``--config``.

Spelling
--------

command line
   ``--connect-timeout 3``, ``--connect-timeout=3``, ``-connect-timeout 3`` or ``-connect-timeout=3``

environment
   ``{PREFIX}CONNECT_TIMEOUT=3``

file
   ``connect-timeout = 3``

Names are not abbreviated anywhere, and there are no short options but ``-h``. If an option stands on the
command line twice, the last one counts, so that a wrapper script can be overruled.

A wrong value is an error wherever it stands, even if a stronger place overrides it. The message names the
place: the line of the file, the variable, or the option.

File format
-----------

``{DEFAULT_FILE}`` is read if it exists. ``--config FILE`` (or ``{PREFIX}CONFIG``) names
another file, which is read *instead* of it and must exist; ``--config /dev/null`` reads none. The file is
UTF-8 text of at most 1 MiB, and a regular file: a pipe or a device is refused.

.. code-block:: ini

   # A comment has a line to itself ...
   connect-timeout = 3     # ... or follows a value, after a blank.
                           ; A semicolon does the same.
   ports = 15002,15006
   log-file = "/var/log/relay # 1.log"

A value needs quotes, ``"`` or ``'``, if it begins with a quote or has a blank and then ``#`` or ``;`` in
it. Inside quotes, the same quote is written twice. Without them, everything from ``=`` to the comment is
the value; ``eth0#1`` is one. A list may stand in brackets: ``ports = [15002, 15006]``.

Nothing in the file is passed over. An unknown name, a name set twice, a ``[section]``, an empty value or a
line without ``=`` is an error.

A running relay reads the file again when it gets HUP. If there is a mistake in it, nothing changes.

Environment
-----------

The variable of a setting is ``{PREFIX}`` and its name in capitals, with ``_`` for ``-``.
``LOG_LEVEL`` and ``LOG_FORMAT`` work without the prefix; with both set, the one with the prefix wins. An
empty variable counts as not set. A variable that begins with ``{PREFIX}`` and belongs to no
setting is ignored, with a warning.

Settings
--------
"""

_PAGE_END = """\
See also
--------

:manpage:`tproxy-relay(8)`
"""


def page() -> str:
    """The text of docs/configuration.rst, the source of tproxy-relay.conf(5)."""
    return "\n".join([_PAGE, *_settings(), _PAGE_END])


def _settings() -> Iterator[str]:
    for title, group in GROUPS.items():
        settable = [option for option in group if option.in_file]
        if settable:
            yield _heading(title, "~")
        for option in settable:
            yield f"``{option.name}`` *{option.metavar}*"
            yield _indented(option.meaning)
            yield ""
            yield _indented(". ".join(_facts(option)))
            yield ""


def _facts(option: Option) -> Iterator[str]:
    if option.kind:
        yield f"*Values:* {_escaped(option.kind.allowed)}"
    yield f"*Variable:* {', '.join(f'``{variable}``' for variable in option.variables)}"
    yield f"*Default:* ``{option.default}``" if option.default else f"*Not set:* {option.unset}"


def synopsis() -> str:
    """One line for each command; the first is what happens without a word."""
    return "\n".join(f"| **tproxy-relay** {_word(word)} [*options*]" for word in COMMAND.words)


def _word(word: str) -> str:
    if word == COMMAND.default:
        return f"[**{word}**]"
    actions = " {" + r" \| ".join(f"**{action}**" for action in ACTION.words) + "}" if word == "rules" else ""
    return f"**{word}**{actions}"


def commands() -> str:
    """Each command, and each word after rules, with what it does."""
    entries = []
    for word, meaning in COMMAND.explained.items():
        entries += [
            f"**{word}**" + (" (the default)" if word == COMMAND.default else ""),
            _indented(_sentence(meaning)),
            "",
        ]
        if word == "rules":
            for action, does in ACTION.explained.items():
                entries += [f"   **{action}**", textwrap.indent(_indented(_sentence(does)), "   "), ""]
    return "\n".join(entries)


def command_line() -> str:
    """Every option that begins with dashes."""
    # Groups of which the file can set nothing come first.
    groups = sorted(GROUPS.items(), key=lambda item: any(option.in_file for option in item[1]))
    return "\n".join(line for title, group in groups for line in _option_group(title, group))


def _option_group(title: str, group: tuple[Option, ...]) -> Iterator[str]:
    yield _heading(title, "~")
    for option in group:
        yield f".. option:: --{option.name} {option.metavar}".rstrip() + (", -h" if option.name == "help" else "")
        yield ""
        yield _indented(option.meaning)
        yield ""
        if option.kind:
            default = f"; default: ``{option.default}``" if option.default else f"; not set: {option.unset}"
            yield _indented(f"[{_escaped(option.kind.allowed)}{default if option.has_value else ''}]")
            yield ""


def exit_status() -> str:
    """Each exit code with its meaning."""
    return "\n".join(f"{code}\n   {meaning}\n" for code, meaning in exit_codes())


def exit_codes() -> list[tuple[int, str]]:
    """Each exit code with its meaning, which is the first line of the error's docstring."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RelayError)]
    summaries = [(kind.exit_code, (kind.__doc__ or "").split("\n")[0].split(" ``")[0]) for kind in kinds]
    return sorted([(0, "Done."), *summaries])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _heading(title: str, underline: str) -> str:
    return f"{title}\n{underline * len(title)}\n"


def _indented(text: str) -> str:
    return textwrap.indent(textwrap.fill(text, 104, break_long_words=False, break_on_hyphens=False), "   ")


def _escaped(text: str) -> str:
    # A bar would begin a substitution.
    return text.replace("|", r"\|")


PARTS = {
    "ragged": lambda: _RAGGED,
    "synopsis": synopsis,
    "commands": commands,
    "options": command_line,
    "exit-status": exit_status,
}
"""What ``.. part::`` can name."""
