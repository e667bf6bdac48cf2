"""The process of the guard: how it begins and ends, and what is not for it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import children
import pytest
from guards import guarding, holders, process

from tproxy_relay.system import proc_title

in_network = pytest.mark.usefixtures("network")


@in_network
def test_signals_for_the_relay_are_not_for_it() -> None:
    with guarding() as running:
        running.answer()
        (holder,) = holders(running)
        for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2:
            for pid in running.child.pid, holder:
                os.kill(pid, number)
        running.order("drain")
        assert running.answer()["state"] == "draining"
        assert holders(running) == [holder]


def test_nothing_to_do_is_no_error() -> None:
    with process() as running:
        assert running.part() == 0


def test_started_by_hand_it_says_what_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tproxy_relay.guard"],
        input="",
        capture_output=True,
        text=True,
        env=children.environment(),
        check=False,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "the guard of the ruleset is started by `tproxy-relay run`\n"


def test_what_is_no_message_of_ours_is_an_error() -> None:
    with process() as running:
        assert running.talk.send({"plan": "{}", "pid": 1})
        failed = running.answer()
        assert (failed["event"], failed["exit_code"]) == ("failed", 1)
        assert "of another version and does not understand this plan" in failed["message"]
        assert running.child.wait(20) == 1


@in_network
def test_it_has_a_name_of_its_own() -> None:
    with guarding() as running:
        running.answer()
        assert Path(f"/proc/{running.child.pid}/comm").read_text().strip() == proc_title.GUARD
