"""`python -m tproxy_relay` is the command."""

import subprocess
import sys

from tproxy_relay import __version__
from tproxy_relay.errors import UsageError


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "tproxy_relay", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_it_obeys_the_command_line() -> None:
    done = command("--version")
    assert (done.returncode, done.stderr) == (0, "") and __version__ in done.stdout


def test_its_exit_code_is_the_commands() -> None:
    done = command("--no-such-option")
    assert done.returncode == UsageError.exit_code and "--no-such-option" in done.stderr
