"""The guard as a process of its own, and the relay's end of its channel, on which the messages are written out."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import children
from deadlines import PATIENCE
from plans import PLAN

from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel

NOTICED = ("host-changed", "counted")
"""Events that may come at any time (guard/surroundings.py)."""


class GuardChild:
    """The process, and the relay's end of its channel."""

    def __init__(self, child: "subprocess.Popen[bytes]", talk: Channel) -> None:
        self.child = child
        self.talk = talk

    def order(self, order: str, *descriptors: int, **more: object) -> None:
        """Send an order of that name with those fields."""
        assert self.talk.send({"order": order, **more}, descriptors)

    def answer(self) -> dict[str, Any]:
        """What it says next."""
        return answer(self.talk)

    def part(self) -> int:
        """The relay dies; the exit code."""
        self.talk.close()
        return self.child.wait(PATIENCE)


def answer(talk: Channel) -> dict[str, Any]:
    """What comes next on that channel, but for what is noticed beside the rules."""
    while True:
        received = talk.receive(PATIENCE)
        assert received is not None and not received[1]
        if received[0].get("event") not in NOTICED:
            return received[0]


@contextmanager
def process() -> Iterator[GuardChild]:
    """A guard that has not been told anything yet."""
    talk, theirs = channel.pair()
    with subprocess.Popen(
        [sys.executable, "-m", "tproxy_relay.guard"], stdin=theirs.fileno(), env=children.environment()
    ) as child:
        theirs.close()
        try:
            yield GuardChild(child, talk)
        finally:
            child.kill()
            talk.close()


@contextmanager
def guarding(plan: Plan = PLAN, name: str = "nft", state: str = "active", pid: int = 4711) -> Iterator[GuardChild]:
    """A guard that has been told to install that plan."""
    with process() as running:
        assert running.talk.send({"plan": plans.to_json(plan), "backend": name, "state": state, "pid": pid})
        yield running


def holders(running: GuardChild) -> list[int]:
    """The processes that hold its table."""
    children_of = Path(f"/proc/{running.child.pid}/task/{running.child.pid}/children")
    return [int(pid) for pid in children_of.read_text().split()]
