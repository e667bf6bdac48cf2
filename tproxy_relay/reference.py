"""Texts made from the table of options: --help, docs/configuration.rst, etc/tproxy-relay.conf.

``python -m tproxy_relay.reference rst`` (or ``conf``, ``help``) prints one of them; the two files in the
tree are its output, and a test compares them. Whoever changes an option runs it again.
"""

import sys
import textwrap
from collections.abc import Iterator

from tproxy_relay import errors, options
from tproxy_relay.options import DEFAULT_FILE, GROUPS, POSITIONAL, PREFIX, Option

# What the packaged file really sets: a service logs for machines, a terminal for people.
SHIPPED = {"bind": "127.0.0.1,::1", "user": "tproxy-relay", "log-level": "info", "log-format": "json"}
"""What a service wants that a first try on the command line does not; the packages make the account."""

_HELP = """\
usage: tproxy-relay [run | check | demo] [options]
       tproxy-relay rules show|apply|remove|status [options]

A transparent TCP relay: connections that firewall rules steer here go on to where they were going.

"""

_HELP_END = f"""\
Each option is spelled --name or -name, with a blank or = before its value. In the
file it has no dashes (connect-timeout = 3), in the environment it is {PREFIX}
and the name (TPROXY_RELAY_CONNECT_TIMEOUT). LOG_LEVEL and LOG_FORMAT work as well.
The command line wins over the environment, the environment over the file
{DEFAULT_FILE}, and the file over the defaults.
"""

_PAGE = f"""\
.. Made by "python -m tproxy_relay.reference rst". Change tproxy_relay/options.py or
   tproxy_relay/reference.py instead of this page.

Configuration
=============

Every setting has one name, and four places can set it. The first of these that does wins:

1. the command line,
2. the environment,
3. the configuration file,
4. the default.

``tproxy-relay --print-config`` prints every setting and where its value came from. What it prints is
itself a configuration file, so it can be kept and given back with ``--config``.

Spelling
--------

=================  ==================================================================
command line       ``--connect-timeout 3``, ``--connect-timeout=3``,
                   ``-connect-timeout 3``, ``-connect-timeout=3``
environment        ``{PREFIX}CONNECT_TIMEOUT=3``
file               ``connect-timeout = 3``
=================  ==================================================================

Names are not abbreviated anywhere, and there are no short options but ``-h``. If an option stands on the
command line twice, the last one counts, so that a wrapper script can be overruled.

A wrong value is an error wherever it stands, even if a stronger place overrides it. The message names the
place: the line of the file, the variable, or the option.

The file
--------

``{DEFAULT_FILE}`` is read if it exists. ``--config FILE`` (or ``{PREFIX}CONFIG``) names
another file, which is read *instead* of it and must exist; ``--config /dev/null`` reads none. The file is
UTF-8 text of at most 1 MiB, and a regular file: a pipe or a device is refused.

.. code-block:: ini

   # A comment has a line to itself ...
   connect-timeout = 3     # ... or follows a value, after a blank. A ; does the same.
   ports = 15002,15006
   log-file = "/var/log/relay # 1.log"

A value needs quotes, ``"`` or ``'``, if it begins with a quote or has a blank and then ``#`` or ``;`` in
it. Inside quotes, the same quote is written twice. Without them, everything from ``=`` to the comment is
the value; ``eth0#1`` is one. A list may stand in brackets: ``ports = [15002, 15006]``.

Nothing in the file is passed over. An unknown name, a name set twice, a ``[section]``, an empty value or a
line without ``=`` is an error.

The environment
---------------

The variable of a setting is ``{PREFIX}`` and its name in capitals, with ``_`` for ``-``.
``LOG_LEVEL`` and ``LOG_FORMAT`` work without the prefix; with both set, the one with the prefix wins. An
empty variable counts as not set. A variable that begins with ``{PREFIX}`` and belongs to no
setting is ignored, with a warning.
"""


def help_text() -> str:
    """What --help prints."""
    return (
        _HELP
        + "".join(_help_entry(word, word.name) for word in POSITIONAL)
        + "\n"
        + "".join(map(_help_group, GROUPS))
        + _HELP_END
    )


def _help_group(title: str) -> str:
    entries = "".join(_help_entry(option, f"--{option.name} {option.metavar}".rstrip()) for option in GROUPS[title])
    return f"{title}:\n{entries}\n"


def _help_entry(option: Option, heading: str) -> str:
    return f"  {heading}\n{textwrap.indent(_description(option, 76), ' ' * 8)}\n"


def _description(option: Option, width: int) -> str:
    """The meaning, and on a line of its own what is allowed and the default."""
    paragraphs = (option.meaning, _in_brackets(option))
    return "\n".join(_filled(paragraph, width) for paragraph in paragraphs if paragraph)


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _in_brackets(option: Option) -> str:
    """What is allowed, and the default."""
    facts = [option.kind.allowed] if option.kind else []
    if option.is_setting and option.kind:
        facts.append(f"default: {option.default}" if option.default else f"not set: {option.unset}")
    return f"[{'; '.join(facts)}]" if facts else ""


def conf() -> str:
    """What etc/tproxy-relay.conf holds."""
    return "\n".join(_conf_lines())


def _conf_lines() -> Iterator[str]:
    yield f"# {DEFAULT_FILE}: settings of tproxy-relay."
    yield "#"
    yield "# Lines with # before them show the defaults. Command line and environment win over this file."
    yield "# 'tproxy-relay --print-config' shows what is in force, and why."
    yield ""
    for title, group in GROUPS.items():
        settable = [option for option in group if option.in_file and option.kind]
        if settable:
            yield f"# --- {title} ---"
            yield ""
        for option in settable:
            yield textwrap.indent(_description(option, 98), "# ")
            yield _conf_setting(option)
            yield ""


def _conf_setting(option: Option) -> str:
    if option.name in SHIPPED:
        return f"{option.name} = {SHIPPED[option.name]}"
    return f"#{option.name} = {option.default}".rstrip()


def rst() -> str:
    """What docs/configuration.rst holds."""
    return "\n".join([_PAGE, *_rst_settings(), *_rst_exit_codes(), ""])


def _rst_settings() -> Iterator[str]:
    yield _heading("Settings", "-")
    for word in POSITIONAL:
        yield from _rst_entry(word)
    for title, group in GROUPS.items():
        yield _heading(title, "~")
        for option in group:
            yield from _rst_entry(option)


def _rst_entry(option: Option) -> Iterator[str]:
    name = option.name if option.in_file or option in POSITIONAL else f"--{option.name}"
    metavar = f" *{option.metavar}*" if option.kind and option not in POSITIONAL else ""
    yield f"``{name}``{metavar}"
    yield textwrap.indent(_filled(option.meaning, 104), "   ")
    yield ""
    yield textwrap.indent("\n".join(_rst_facts(option)), "   ")
    yield ""


def _rst_facts(option: Option) -> Iterator[str]:
    if option.kind:
        yield f":Values: {_escaped(option.kind.allowed)}"
    if option.is_setting and option.kind:
        yield f":Default: ``{option.default}``" if option.default else f":Not set: {option.unset}"
    yield f":Set by: {', '.join(_places(option))}"


def _places(option: Option) -> Iterator[str]:
    yield "command line"
    yield from (f"``{variable}``" for variable in option.variables)
    if option.in_file:
        yield "file"


def _rst_exit_codes() -> Iterator[str]:
    yield _heading("Exit codes", "-")
    bar = f"{'=' * 4}  {'=' * 90}"
    yield bar
    for code, meaning in exit_codes():
        yield f"{code:<4}  {meaning}"
    yield bar


def exit_codes() -> list[tuple[int, str]]:
    """Each exit code with its meaning, which is the first line of the error's docstring."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.RelayError)]
    summaries = [(kind.exit_code, (kind.__doc__ or "").split("\n")[0].split(" ``")[0]) for kind in kinds]
    return sorted([(0, "Done."), *summaries])


def _heading(title: str, underline: str) -> str:
    return f"{title}\n{underline * len(title)}\n"


def _escaped(text: str) -> str:
    # A bar would begin a substitution.
    return text.replace("|", r"\|")


TEXTS = {"help": help_text, "rst": rst, "conf": conf}


def main(arguments: list[str]) -> int:
    """Print the text that the one argument names."""
    if len(arguments) != 1 or arguments[0] not in TEXTS:
        print(f"usage: python -m {options.__package__}.reference {'|'.join(TEXTS)}", file=sys.stderr)
        return errors.UsageError.exit_code
    print(TEXTS[arguments[0]](), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
