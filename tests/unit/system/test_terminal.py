"""What a HUP means, in processes with a terminal of their own. e2e/test_hangup.py has the relay and real shells."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO

import pytest
from children import environment
from deadlines import PATIENCE

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

CODE = """
import os, signal, time
from tproxy_relay.system.terminal import Terminal

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

end, parent = time.monotonic() + 60, os.getppid()  # before anybody may end the parent
terminal = Terminal(lambda number: say("notified", number.name))
signal.signal(signal.SIGHUP, lambda number, frame: say("HUP", "terminal" if terminal.takes_hup() else "reload"))
say("ready", os.getpid(), terminal.deadline is not None)
while os.getppid() == parent and time.monotonic() < end:
    if terminal.deadline is not None and time.monotonic() >= terminal.deadline:
        terminal.tick(time.monotonic())
        if terminal.deadline is None:
            say("closed")
    time.sleep(0.01)
"""


LEADER = """
import os, signal, subprocess, sys
signal.signal(signal.SIGHUP, lambda number, frame: None)
subprocess.Popen(sys.argv[1:], preexec_fn=os.setpgrp).wait()
"""
DISOWNED = (sys.executable, "-c", LEADER)
"""A job of a session whose leader lives on: the kernel sends HUP to that one only."""


class Child:
    """A process that says what comes, with a terminal or without."""

    def __init__(self, prefix: tuple[str, ...], stdin: int) -> None:
        command = [*prefix, sys.executable, "-c", CODE]
        self.process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True, env=environment())

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def is_ready(self) -> bool:
        """True if it has a terminal."""
        word, pid, has_terminal = self.says().split()
        assert word == "ready"
        self.job = int(pid)
        return has_terminal == "True"

    def hup(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def hup_job(self) -> None:
        """Where it is the shell's, and not ours."""
        os.kill(self.job, signal.SIGHUP)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)


@contextlib.contextmanager
def in_terminal(*prefix: str) -> Iterator[tuple[Child, FileIO]]:
    """The child, whose terminal is gone when the file is closed: it is the leader of its session, as what `ssh -t` runs
    is."""
    master, slave = os.openpty()
    with FileIO(master, "r+") as terminal:
        child = Child(("setsid", "--ctty", *prefix), slave)
        os.close(slave)
        try:
            assert child.is_ready()
            yield child, terminal
        finally:
            child.end()


def test_a_hup_while_the_terminal_is_there_is_a_wish_to_reload() -> None:
    with in_terminal() as (child, _):
        child.hup()
        assert child.says() == "HUP reload"


def test_the_end_of_the_terminal_is_to_be_the_end() -> None:
    with in_terminal() as (child, master):
        master.close()
        assert child.says() == "notified SIGTERM"
        assert child.says() == "HUP terminal"
        child.hup()
        assert child.says() == "HUP terminal", "from the shell, when it ends: it is no second TERM, nor a reload"


def test_a_hup_right_before_the_terminal_goes_is_about_that() -> None:
    """zsh sends one to its jobs when it exits, and then the terminal goes. Jobs get no second one."""
    with in_terminal(*DISOWNED) as (child, master):
        child.hup_job()
        master.close()
        assert {child.says(), child.says()} == {"notified SIGTERM", "HUP terminal"}


def test_a_hup_that_was_a_wish_to_reload_is_not_about_the_end_that_comes_later() -> None:
    with in_terminal(*DISOWNED) as (child, master):
        child.hup_job()
        assert child.says() == "HUP reload"
        master.close()
        assert child.says() == "closed", "nobody has sent another one"


def test_under_nohup_it_goes_on() -> None:
    with in_terminal("nohup") as (child, master):
        master.close()
        assert child.says() == "HUP terminal"
        assert child.says() == "closed"
        child.hup()
        assert child.says() == "HUP reload"


def test_without_a_terminal_every_hup_is_a_wish_to_reload() -> None:
    child = Child(("setsid",), subprocess.DEVNULL)
    try:
        assert not child.is_ready()
        child.hup()
        assert child.says() == "HUP reload"
    finally:
        child.end()
