"""Command line and environment of the processes that this one starts: more of this program, and programs of others.

What a child gets beside that (descriptors, session, folder) is said where it is started.
"""

import os
import sys
from collections.abc import Collection, Mapping

OF_THE_MANAGER = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
"""sd_notify(3), sd_watchdog_enabled(3): variables for the process that a service manager has started, and no other."""

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder that this package is in."""


def module_command(module: str) -> list[str]:
    """The command line that runs this module of the package, with our own interpreter; see `own_environment`."""
    return [sys.executable, "-m", module]


def script_command(path: str, *arguments: str) -> list[str]:
    """The command line that runs this file, with our own interpreter, which loads nothing beside the standard library
    (-S) and heeds nothing of the user's environment (-I)."""
    return [sys.executable, "-I", "-S", path, *arguments]


def own_environment(without: Collection[str] = ()) -> dict[str, str]:
    """Our environment without these variables, and so that the same program runs, also from a checkout that is not
    installed."""
    path = [_PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {name: value for name, value in os.environ.items() if name not in without}
    return {**ours, "PYTHONPATH": os.pathsep.join(path)}


def program_environment(inherited: Mapping[str, str], path: str) -> dict[str, str]:
    """For a program of somebody else: these variables, this PATH, and messages that are not translated."""
    return {**inherited, "PATH": path, "LC_ALL": "C"}
