"""A scoreboard of our own, with a slot for whoever needs one, and processes that have one, too."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import children
from deadlines import PATIENCE

from tproxy_relay.ipc.scoreboard import Scoreboard
from tproxy_relay.ipc.slot import Slot


@contextmanager
def slots(count: int = 1, connections: int = 100) -> Iterator[list[Slot]]:
    """So many slots, for workers that have at most so many connections each."""
    scoreboard = Scoreboard.create(connections)
    made = []
    try:
        for _ in range(count):
            number = scoreboard.claim()
            assert number is not None
            made.append(Slot(scoreboard, number))
        yield made
    finally:
        scoreboard.close()


REMOTE = """
import os, sys
from tproxy_relay.ipc.scoreboard import Scoreboard
from tproxy_relay.ipc.slot import Slot
scoreboard = Scoreboard(int(sys.argv[1]), int(sys.argv[2]))
slot = Slot(scoreboard, int(sys.argv[3]))
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""

TAKE = "turn = scoreboard.turn(); print(turn.__enter__())"
LEAVE = "turn.__exit__(None, None, None)"
"""For `Remote.does`: take the turn of the scoreboard, and end it."""


class Remote:
    """A worker's process that does what it is told, in Python with `scoreboard` and `slot`."""

    def __init__(self, slot: Slot) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", REMOTE, *map(str, slot.scoreboard.descriptors), str(slot.number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=slot.scoreboard.descriptors,
            text=True,
            env=children.environment(),
        )

    def begin(self, code: str) -> None:
        """Have it begin with this line."""
        assert self.child.stdin is not None
        self.child.stdin.write(code + "\n")
        self.child.stdin.flush()

    def said(self) -> list[str]:
        """What it printed, once it has done that."""
        assert self.child.stdout is not None
        lines = []
        while (line := self.child.stdout.readline().strip()) != "done":
            assert line, "it has ended"
            lines.append(line)
        return lines

    def does(self, code: str) -> list[str]:
        """Begin and wait."""
        self.begin(code)
        return self.said()

    def close(self) -> None:
        """The end of it."""
        self.child.kill()
        self.child.wait(PATIENCE)
        with contextlib.suppress(BrokenPipeError):
            assert self.child.stdin is not None and self.child.stdout is not None
            self.child.stdout.close()
            self.child.stdin.close()


@contextmanager
def remotes(*of: Slot) -> Iterator[list[Remote]]:
    """One for each of these slots, ready."""
    with contextlib.ExitStack() as stack:
        made = []
        for slot in of:
            made.append(Remote(slot))
            stack.callback(made[-1].close)
        for remote in made:
            remote.does("pass")
        yield made


def claimed(scoreboard: Scoreboard) -> int:
    """The number of a slot that nobody had."""
    number = scoreboard.claim()
    assert number is not None
    return number
