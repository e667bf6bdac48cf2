"""The `tproxy-relay` command: read the settings, do what the command says, end with its exit code."""

import os
import sys
from collections.abc import Sequence

from tproxy_relay import config, service
from tproxy_relay.errors import RelayError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; default: the process's own).

    Returns the exit code: 0, or the one of the RelayError that stopped it (errors.py).
    """
    try:
        loaded = config.load(sys.argv[1:] if argv is None else argv, os.environ)
        for warning in loaded.warnings:
            _say(warning)
        if loaded.print_config:
            print(config.print_config(loaded), end="")
            return 0
        if loaded.settings.command == "demo":
            from tproxy_relay import demo  # here, because a relay has no use for the network lab in its memory

            return demo.run(loaded.settings)
        return service.run(loaded.settings, os.environ)
    except RelayError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _say(line: str) -> None:
    print(f"tproxy-relay: {line}", file=sys.stderr)
