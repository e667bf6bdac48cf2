"""The `tproxy-relay` command: read the settings, do what the command says, end with its exit code."""

import os
import sys
from collections.abc import Sequence

from tproxy_relay.cli import run
from tproxy_relay.cli.arguments import Arguments
from tproxy_relay.config import loader
from tproxy_relay.errors import RelayError
from tproxy_relay.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: the process's own).

    Returns the exit code: 0, or the one of the RelayError that stopped it (errors.py).
    """
    given = sys.argv[1:] if argv is None else argv
    try:
        loaded = loader.load(given, os.environ)
        arguments = Arguments(**loaded.arguments)
        if arguments.command == "run" and not loaded.print_config:
            run.give_up_privileges(os.environ)
        for warning in loaded.warnings:
            _complain(warning)
        if loaded.print_config:
            print(loader.print_config(loaded), end="")
            return 0
        return _perform(loaded.settings, arguments, given)
    except RelayError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _perform(settings: Settings, arguments: Arguments, argv: Sequence[str]) -> int:
    # The others are imported here, because a relay has no use for them in its memory.
    if arguments.command == "demo":
        from tproxy_relay import demo

        return demo.run(keep=arguments.keep)
    if arguments.command == "rules":
        from tproxy_relay.cli import rules

        return rules.run(settings, arguments)
    if arguments.command in ("install", "uninstall"):
        from tproxy_relay.cli import install

        return install.run(arguments)
    if arguments.command == "status":
        from tproxy_relay.cli import status

        return status.run(settings, as_json=arguments.json)
    if arguments.command == "sessions":
        from tproxy_relay.cli import sessions

        return sessions.run(settings, arguments)
    if arguments.command == "top":
        from tproxy_relay.cli import top

        return top.run(settings, dict(arguments.show))
    if arguments.command == "check":
        from tproxy_relay import check

        return check.run(settings, as_json=arguments.json)

    def reread() -> Settings:
        return loader.load(argv, os.environ).settings

    return run.run(settings, reread, os.environ, take_over=arguments.take_over)


def _complain(line: str) -> None:
    print(f"tproxy-relay: {line}", file=sys.stderr)
