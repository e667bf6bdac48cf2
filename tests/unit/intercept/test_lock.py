"""One holder of the ruleset in a network, and the others hear who it is."""

import os
import select
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import children
import pytest

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.intercept import lock
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.net import unix_sockets
from tproxy_relay.net.unix_sockets import Peer

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


@contextmanager
def wanted() -> Iterator["Future[Lock]"]:
    """Somebody else wants it."""
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(Lock)
        yield asking
        asking.cancel()


def asks(held: Lock) -> bool:
    return bool(select.select([held], [], [], 5)[0])


def test_what_is_held_for_nobody_any_more_is_given_back_to_one_who_wants_it() -> None:
    held = Lock()
    with wanted() as asking:
        assert asks(held) and held.answer(4711, lingers=True)
        assert not select.select([held], [], [], 0.1)[0] and not asking.done(), "it waits"
        held.close()
        with asking.result(5):
            found = lock.holder()
            assert found is not None and found.pid == os.getpid()


def test_who_only_looks_is_told_and_wants_nothing() -> None:
    with Lock() as held, ThreadPoolExecutor() as pool:
        looking = pool.submit(lock.holder)
        assert asks(held) and not held.answer(4711, lingers=True)
        found = looking.result(5)
        assert found is not None and found.pid == 4711


def test_another_account_cannot_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lock() as held, wanted() as asking:
        assert asks(held)
        with monkeypatch.context() as patched:
            patched.setattr(unix_sockets, "peer", lambda _: Peer(1, 65534))
            assert not held.answer(4711, lingers=True)
        with pytest.raises(SystemRefusedError, match="process 4711"):
            asking.result(5)


def test_one_that_is_given_back_without_a_word_can_be_taken() -> None:
    held = Lock()
    with wanted() as asking:
        assert asks(held)
        held.close()
        asking.result(5).close()


def test_one_that_is_not_given_back_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_TIMEOUT", 0.1)
    with Lock() as held, wanted() as asking:
        assert asks(held) and held.answer(4711, lingers=True)
        with pytest.raises(SystemRefusedError, match=f"process {os.getpid()} holds the ruleset"):
            asking.result(5)
