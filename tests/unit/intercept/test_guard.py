"""The guard as a process: what it answers, and what is left when the relay's end of the pipe is closed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import children
import pytest
from deadlines import PATIENCE
from plans import PLAN, quickly

from tproxy_relay.intercept import backends, guard, lock
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import programs, ruleset
from tproxy_relay.intercept.guard import Lines
from tproxy_relay.intercept.plan import Plan

CLOSED = replace(PLAN, on_failure="closed")

in_network = pytest.mark.usefixtures("network")


class Guard:
    """The process, and both ends of its pipes."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self.child = child

    def say(self, line: str) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(f"{line}\n")
        self.child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        told: dict[str, Any] = json.loads(self.child.stdout.readline())
        return told

    def part(self) -> int:
        """The relay dies; the exit code."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        return self.child.wait(PATIENCE)


@contextmanager
def guarding(plan: Plan = PLAN, name: str = "nft", state: str = "active") -> Iterator[Guard]:
    with subprocess.Popen(
        [sys.executable, "-m", "tproxy_relay.intercept.guard"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=children.environment(),
    ) as child:
        try:
            running = Guard(child)
            running.say(json.dumps({"plan": plans.to_json(plan), "backend": name, "state": state}))
            yield running
        finally:
            child.kill()


def state_of(plan: Plan) -> str:
    return ruleset.status(plan).state


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_it_drains_and_removes_when_told(name: str) -> None:
    with guarding(name=name) as running:
        assert running.answer() == {"event": "installed", "backend": name, "state": "active"}
        assert state_of(PLAN) == "active"
        running.say("drain")
        assert running.answer() == {"event": "changed", "state": "draining"}
        assert state_of(PLAN) == "draining"
        running.say("remove")
        assert running.answer() == {"event": "changed", "state": "removed"}
        assert state_of(PLAN) == "absent"
        assert running.child.wait(PATIENCE) == 0


@in_network
@pytest.mark.parametrize(
    "plan, name, left",
    [
        (PLAN, "nft", "absent"),
        (PLAN, "iptables-nft", "absent"),
        (CLOSED, "nft", "active"),
        (CLOSED, "iptables-nft", "closed"),
    ],
)
def test_what_is_left_when_the_relay_dies(plan: Plan, name: str, left: str) -> None:
    with guarding(plan, name) as running:
        assert running.answer()["event"] == "installed"
        assert running.part() == 0
        assert state_of(plan) == left
    ruleset.remove()
    assert state_of(plan) == "absent"


@in_network
def test_a_relay_that_dies_while_draining_leaves_nothing() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        running.say("drain")
        running.answer()
        running.part()
        assert state_of(CLOSED) == "absent"


@in_network
def test_it_can_begin_with_draining() -> None:
    with guarding(state="draining") as running:
        assert running.answer()["state"] == "draining"
        assert state_of(PLAN) == "draining"


@in_network
def test_signals_for_the_relay_are_not_for_it() -> None:
    with guarding() as running:
        running.answer()
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            running.child.send_signal(number)
        running.say("drain")
        assert running.answer()["state"] == "draining"


@in_network
def test_it_holds_the_lock_for_the_relay_and_a_second_one_fails() -> None:
    with guarding() as running:
        running.answer()
        found = lock.holder()
        assert found is not None and found.pid == os.getpid()
        with guarding() as second:
            failed = second.answer()
            assert (failed["event"], failed["exit_code"]) == ("failed", 71)
        assert state_of(PLAN) == "active"


@in_network
def test_what_keeps_it_from_installing_is_told() -> None:
    programs.run("ip route add 192.0.2.0/24 dev lo table 7006".split())
    with guarding() as running:
        failed = running.answer()
        assert (failed["event"], failed["exit_code"]) == ("failed", 71)
        assert "routing table 7006" in failed["message"]
        assert running.child.wait(PATIENCE) == 71
    assert backends.present() == []


@in_network
@pytest.mark.slow
def test_what_somebody_takes_away_is_put_back() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        programs.run(["nft", "flush", "ruleset"])
        programs.run("ip rule del pref 7007".split())
        restored = running.answer()
        assert restored["event"] == "restored"
        assert "inet prerouting: missing" in restored["what"] and "pref 7007" in restored["what"]
        assert state_of(CLOSED) == "active"


@in_network
def test_a_table_whose_owner_was_killed_is_put_back() -> None:
    with guarding() as running:
        running.answer()
        (holder,) = open(f"/proc/{running.child.pid}/task/{running.child.pid}/children").read().split()
        os.kill(int(holder), signal.SIGKILL)
        assert "the process that held the table had died" in running.answer()["what"]
        assert state_of(PLAN) == "active"
        assert running.part() == 0
    assert state_of(PLAN) == "absent"


@in_network
def test_without_an_owner_the_guard_takes_the_table_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.12 there is no such flag."""

    def refuse(*_: object) -> None:
        raise programs.ProgramError("no such flag")

    monkeypatch.setattr(guard.Holder, "load", refuse)
    one = guard.Guard(PLAN, "nft", "active")
    assert one.backend == "nft" and state_of(PLAN) == "active"
    one.relay_died()
    assert state_of(PLAN) == "absent"


def test_nothing_to_do_is_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tproxy_relay.intercept.guard"],
        input="",
        capture_output=True,
        text=True,
        env=children.environment(),
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def pipe() -> Iterator[tuple[Lines, Callable[[bytes], object]]]:
    reader, writer = os.pipe()
    end = os.fdopen(writer, "wb", buffering=0)

    def write(data: bytes) -> None:
        end.write(data) if data else end.close()

    yield Lines(reader), write
    os.close(reader)
    end.close()


def test_lines_come_whole(pipe: tuple[Lines, Callable[[bytes], object]]) -> None:
    lines, write = pipe
    write(b"fir")
    assert lines.read() == []
    write(b"st\nsecond\nthi")
    assert lines.first() == "first"
    assert lines.waiting and lines.read() == ["second"] and not lines.waiting
    write(b"rd\n\n")
    assert lines.read() == ["third"]
    write(b"")
    assert lines.read() == [""] == [lines.first()]
