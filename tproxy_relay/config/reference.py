"""Texts made from the table of options: --help and etc/tproxy-relay.conf here, the others in manual and completion.

``python -m tproxy_relay.config.reference NAME`` prints one of them. The files in the tree are its output, and a test
compares them. Whoever changes an option runs ``python -m tproxy_relay.config.reference all`` in the project's folder,
which writes them again.
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tproxy_relay import errors
from tproxy_relay.config import options
from tproxy_relay.config.options import DEFAULT_FILE, GROUPS, POSITIONAL, PREFIX, Option

# What the packaged file really sets: a service logs for machines, a terminal for people.
SHIPPED = {"bind": "127.0.0.1,::1", "user": "tproxy-relay", "log-level": "info", "log-format": "json"}
"""What a service wants that a first try on the command line does not; the packages make the account."""

_HELP = """\
usage: tproxy-relay [run | check | demo] [options]
       tproxy-relay rules show|apply|remove|status [options]
       tproxy-relay install|uninstall [options]

A transparent TCP relay: connections that firewall rules steer here go on to where they were going.

"""

_HELP_END = f"""\
Each option is spelled --name or -name, with a blank or = before its value. In the
file it has no dashes (connect-timeout = 3), in the environment it is {PREFIX}
and the name (TPROXY_RELAY_CONNECT_TIMEOUT). LOG_LEVEL and LOG_FORMAT work as well.
The command line wins over the environment, the environment over the file
{DEFAULT_FILE}, and the file over the defaults.
"""


def help_text() -> str:
    """The text that --help prints."""
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
    if option.has_value and option.kind:
        facts.append(f"default: {option.default}" if option.default else f"not set: {option.unset}")
    return f"[{'; '.join(facts)}]" if facts else ""


def conf() -> str:
    """The text of etc/tproxy-relay.conf: every setting with its default, as a comment, and those of SHIPPED."""
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


FILES = {
    "conf": "etc/tproxy-relay.conf",
    "rst": "docs/configuration.rst",
    "bash": "etc/completion/tproxy-relay.bash",
    "zsh": "etc/completion/_tproxy-relay",
}
"""Where in the project each text is kept."""


def text(name: str) -> str:
    """The text of this name: help, or one of FILES."""
    # A relay wants --help at most.
    from tproxy_relay.config import completion, manual

    makers = {
        "help": help_text,
        "conf": conf,
        "rst": manual.page,
        "bash": completion.bash,
        "zsh": completion.zsh,
    }
    return makers[name]()


def main(arguments: list[str]) -> int:
    """Print the text that the one argument names, or write all of FILES."""
    if arguments == ["all"]:
        for name, path in FILES.items():
            Path(path).write_text(text(name), encoding="utf-8")
    elif len(arguments) == 1 and arguments[0] in ("help", *FILES):
        print(text(arguments[0]), end="")
    else:
        print(f"usage: python -m {options.__package__}.reference {'|'.join(('all', 'help', *FILES))}", file=sys.stderr)
        return errors.UsageError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
