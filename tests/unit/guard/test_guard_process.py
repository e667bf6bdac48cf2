"""A guard is started, and its end is waited for."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from plans import PLAN

from tproxy_relay.errors import RelayError
from tproxy_relay.guard import guard_process, messages
from tproxy_relay.settings import PortRange


@pytest.mark.usefixtures("network")
def test_it_has_its_first_message_and_answers() -> None:
    guard, talk = guard_process.start(messages.Start(PLAN, "nft", "active", os.getpid()))
    message = messages.receive_event(talk)
    assert message is not None and messages.event_of(message) == messages.Installed("nft", "active")
    assert os.getsid(guard.pid) == guard.pid and os.readlink(f"/proc/{guard.pid}/cwd") == "/"
    messages.send_order(talk, messages.Remove())
    message = messages.receive_event(talk)
    assert message is not None and messages.event_of(message) == messages.Changed("removed", guard.pid)
    assert messages.receive_event(talk) is None and guard.wait(20) == 0
    talk.close()


def test_a_plan_that_is_too_long_starts_none_that_stays() -> None:
    many = tuple(PortRange(port, port) for port in range(1, 60001, 2))
    with pytest.raises(RelayError, match="name fewer ranges of ports"):
        guard_process.start(messages.Start(replace(PLAN, inbound=many), "nft", "active", os.getpid()))


def test_the_end_of_a_process_is_waited_for() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        began = time.monotonic()
        guard_process.await_end(process.pid)
        assert time.monotonic() - began >= guard_process.END_TIMEOUT, "it lives"
        process.stdin.close()
        process.wait()
        began = time.monotonic()
        guard_process.await_end(process.pid)
        assert time.monotonic() - began < guard_process.END_TIMEOUT
