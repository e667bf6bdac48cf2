"""The process of the doctor: it answers in lines, and ends with who has started it."""

import json
import subprocess
import sys

import children
import pytest
from deadlines import PATIENCE
from doctor import PORT

from tproxy_relay.check.background import LOOK, Order
from tproxy_relay.intercept import planning
from tproxy_relay.settings import Settings

COMMAND = [sys.executable, "-m", "tproxy_relay.check"]


def start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=children.environment())


@pytest.mark.usefixtures("network")
def test_it_answers_in_lines() -> None:
    settings = Settings(intercept_inbound=(PORT,))
    with start() as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps(Order(settings, planning.for_host(settings), (LOOK,)).to_json()).encode() + b"\n")
        child.stdin.flush()
        lines = [json.loads(line) for line in child.stdout]
        assert lines[-1] == {"done": True} and "finding" in lines[0]
        assert child.wait(PATIENCE) == 0


def test_it_ends_with_who_has_started_it() -> None:
    with start() as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(PATIENCE) == 2, "before it was told anything"


def test_by_hand_it_says_what_it_is() -> None:
    done = subprocess.run(
        COMMAND, input="nonsense\n", capture_output=True, text=True, env=children.environment(), check=False
    )
    assert done.returncode == 2 and "tproxy-relay check" in done.stderr
