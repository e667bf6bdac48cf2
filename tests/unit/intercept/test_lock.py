"""One holder of the ruleset in a network, and the others hear who it is."""

import os
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import children
import pytest

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.intercept import lock
from tproxy_relay.intercept.lock import Lock

pytestmark = pytest.mark.usefixtures("network")

HOLD = """
from tproxy_relay.intercept.lock import Lock
held = Lock()
print("held", flush=True)
input()
"""


@contextmanager
def held_elsewhere() -> Iterator[int]:
    with children.running_python(HOLD) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        yield other.pid


def test_nobody_holds_it_until_somebody_does() -> None:
    assert lock.holder() is None
    with Lock():
        pass
    assert lock.holder() is None


def test_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ANSWER_TIMEOUT", 0.05)
    with held_elsewhere() as pid:
        found = lock.holder()
        assert found is not None and (found.pid, found.uid) == (pid, os.geteuid())
        with pytest.raises(SystemRefusedError, match=f"process {pid} holds the ruleset of this host: stop that relay"):
            Lock()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with Lock():
            with pytest.raises(SystemRefusedError):
                Lock()


def test_whoever_asks_is_told_for_whom() -> None:
    with Lock() as held:
        child = os.fork()
        if not child:
            found = lock.holder()
            os._exit(0 if found is not None and found.pid == 4711 else 1)
        assert select.select([held], [], [], 5)[0]
        held.answer(4711)
        assert os.waitpid(child, 0)[1] == 0
        held.answer(4711)
