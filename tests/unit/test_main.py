"""`python -m tproxy_relay` is the command."""

import subprocess
import sys
from pathlib import Path

from tproxy_relay import __version__

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "tproxy_relay", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_it_does_what_the_arguments_say() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tproxy-relay {__version__}\n", "")


def test_its_exit_code_is_that_of_the_command() -> None:
    done = run("--no-such-option")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("tproxy-relay: unknown option '--no-such-option'")
