"""Completion as a user meets it: interactive shells on a terminal, in which somebody types and presses Tab."""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tproxy_relay.config.options import COMMAND, OPTIONS, POSITIONAL

FILES = Path(__file__).parents[2] / "etc" / "completion"
BASH_COMPLETION = Path("/usr/share/bash-completion/bash_completion")
LONG = [f"--{name}" for name, option in OPTIONS.items() if option not in POSITIONAL]

# What is typed before Tab, and the command line after it.
ONE = [
    ("--prin", "--print-config"),
    ("chec", "check"),
    ("run --keepa", "run --keepalive"),
    ("--mode re", "--mode redirect"),
    ("-mode re", "-mode redirect"),
    ("--mode=re", "--mode=redirect"),
    ("--mode redirect chec", "--mode redirect check"),
    ("rules --json --mode tproxy st", "rules --json --mode tproxy status"),
    ("rules status --js", "rules status --json"),
    ("--user demo chec", "--user demo check"),
    ("--user roo", "--user root"),
    ("--bind ::1 chec", "--bind ::1 check"),
    ("--config FOLDER/o", "--config FOLDER/one\\ file"),
    ("--log-file=FOLDER/o", "--log-file=FOLDER/one\\ file"),
]
SEVERAL = [
    ("", COMMAND.words),
    ("ru", ("run", "rules")),
    ("rules ", ("show", "apply", "remove", "status")),
    ("--mode ", ("tproxy", "redirect")),
    ("--mode=", ("tproxy", "redirect")),
    ("run --ke", ("--keep", "--keepalive")),
]


class Shell:
    """A shell at a terminal, whose `tproxy-relay` prints its arguments."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._count = 0

    def does(self, line: str) -> None:
        """Run it, and wait until it is done."""
        self._count += 1
        # The quotes keep the terminal's echo of the line from looking like the answer.
        os.write(self._fd, f"{line}; echo DO''NE{self._count}.\n".encode())
        self.shows(f"DONE{self._count}.\r\n")

    def shows(self, *words: str, below: bool = False) -> str:
        """What it writes until all of this was there; with `below`, below the line that was typed."""
        seen, deadline = "", time.monotonic() + 20
        while not all(word in (seen.partition("\n")[2] if below else seen) for word in words):
            ready, _, _ = select.select([self._fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {words} in {seen!r}"
            seen += os.read(self._fd, 65536).decode(errors="replace")
        return seen

    def completes(self, typed: str) -> list[str]:
        """The words of the command line after Tab and Return."""
        os.write(self._fd, f"tproxy-relay {typed}\t\n".encode())
        printed = re.search(r"(<.*>) END\r\n", self.shows("> END\r\n"))
        assert printed
        return re.findall(r"<(.*?)>", printed[1])

    def lists(self, typed: str, *words: str) -> None:
        """On Tab it shows all these words; then the line is thrown away."""
        os.write(self._fd, f"tproxy-relay {typed}\t".encode())
        self.shows(*words, below=True)
        os.write(self._fd, b"\x15")
        self.does(":")


@contextmanager
def shell(tmp_path: Path, *command: str) -> Iterator[Shell]:
    env = {
        "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        "TERM": "dumb",
        "HOME": str(tmp_path),
        "ZDOTDIR": str(tmp_path),
    }
    env |= {"BASH_COMPLETION_USER_DIR": str(tmp_path), "LC_ALL": "C.UTF-8"}
    here, there = pty.openpty()
    try:
        # An interactive shell wants a controlling terminal.
        with subprocess.Popen(
            ["setsid", "--ctty", *command], env=env, stdin=there, stdout=there, stderr=there
        ) as process:
            try:
                one = Shell(here)
                one.does("PS1=")
                one.does("""tproxy-relay() { printf '<%s>' "$@"; echo ' END'; }""")
                yield one
            finally:
                process.kill()
    finally:
        os.close(here)
        os.close(there)


@pytest.fixture(params=["plain", "bash-completion"])
def bash(request: pytest.FixtureRequest, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Shell]:
    """With the file sourced, or found by bash-completion when it is wanted. Tab inserts all there is."""
    with shell(tmp_path, "bash", "--norc", "--noprofile", "-i") as one:
        one.does("""bind 'set bell-style none' '"\\t": insert-completions'""")
        if request.param == "plain":
            one.does(f". {FILES}/tproxy-relay.bash")
        elif BASH_COMPLETION.exists():
            # As packages install it: the file has the name of the command.
            (tmp_path / "completions").mkdir()
            shutil.copy(FILES / "tproxy-relay.bash", tmp_path / "completions" / "tproxy-relay")
            one.does(f". {BASH_COMPLETION}")
        else:
            require_or_skip("bash-completion")
        yield one


@pytest.fixture
def zsh(tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Shell]:
    """With the file in fpath, and nothing else of a user's."""
    if not shutil.which("zsh"):
        require_or_skip("zsh")
    with shell(tmp_path, "zsh", "-f", "-i") as one:
        one.does(
            f"fpath=({FILES} $fpath); autoload -U compinit; compinit -u -D; unsetopt beep list_ambiguous; LISTMAX=1000"
        )
        yield one


def a_folder(tmp_path: Path) -> str:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "one file").touch()
    return str(folder)


def test_bash_completes(bash: Shell, tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    for typed, line in ONE:
        assert bash.completes(typed.replace("FOLDER", folder)) == words_of(line, folder), typed
    for typed, words in SEVERAL:
        done, _, begun = typed.rpartition(" ")
        option = begun if begun.endswith("=") else ""
        first, *others = sorted(words)
        assert bash.completes(typed) == [*done.split(), option + first, *others], typed
    assert "lo" in bash.completes("--interface ")


def test_bash_knows_every_long_option(bash: Shell) -> None:
    assert sorted(bash.completes("--")) == sorted(LONG)


def test_zsh_completes(zsh: Shell, tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    for typed, line in ONE:
        if not typed.startswith("-mode"):  # zsh is told of the spelling with two dashes only
            assert zsh.completes(typed.replace("FOLDER", folder)) == words_of(line, folder), typed
    for typed, words in SEVERAL:
        zsh.lists(typed, *words)
    zsh.lists("--interface ", "lo")
    zsh.lists("--mode ", "redirect", "by nat REDIRECT rules", "tproxy", "by TPROXY rules")


def test_zsh_knows_every_long_option(zsh: Shell) -> None:
    zsh.lists("--", *LONG)


def words_of(line: str, folder: str) -> list[str]:
    return [word.replace("\\ ", " ") for word in re.split(r"(?<!\\) ", line.replace("FOLDER", folder))]


@pytest.mark.parametrize(
    "command", ["shellcheck --shell=bash tproxy-relay.bash", "bash -n tproxy-relay.bash", "zsh -n _tproxy-relay"]
)
def test_the_files_are_sound(command: str, require_or_skip: Callable[[str], NoReturn]) -> None:
    words = command.split()
    if not shutil.which(words[0]):
        require_or_skip(words[0])
    done = subprocess.run(words, cwd=FILES, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
