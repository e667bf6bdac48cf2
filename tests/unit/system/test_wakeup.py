"""Signals and other threads wake an epoll, and nothing is lost or counted twice."""

import os
import select
import signal
import threading
from collections.abc import Iterator

import pytest
from deadlines import PATIENCE

from tproxy_relay.system.wakeup import Wakeup

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture
def wakeup() -> Iterator[Wakeup]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    made = Wakeup()
    yield made
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    made.close()


def awake(wakeup: Wakeup, seconds: float = 0.0) -> bool:
    """True if an epoll would return."""
    return bool(select.select([wakeup], [], [], seconds)[0])


def test_notify_wakes_once(wakeup: Wakeup) -> None:
    assert not awake(wakeup)
    wakeup.notify()
    wakeup.notify()
    assert awake(wakeup)
    assert wakeup.signals() == []
    assert not awake(wakeup)


def test_wake_ups_can_be_taken_without_the_signals(wakeup: Wakeup) -> None:
    """A worker has no signals of its own."""
    wakeup.notify(signal.SIGTERM)
    wakeup.clear()
    assert not awake(wakeup)
    wakeup.clear()
    assert wakeup.signals() == [signal.SIGTERM]


def test_notify_from_another_thread_wakes_a_sleeper(wakeup: Wakeup) -> None:
    threading.Timer(0.05, wakeup.notify).start()
    assert awake(wakeup, PATIENCE)


def test_signals_come_in_their_order_and_once(wakeup: Wakeup) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
        wakeup.notify(number)
    assert wakeup.signals() == [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM]
    assert wakeup.signals() == []


def test_real_signals(wakeup: Wakeup) -> None:
    wakeup.catch([signal.SIGUSR1, signal.SIGUSR2])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert awake(wakeup, PATIENCE)
    os.kill(os.getpid(), signal.SIGUSR2)
    assert wakeup.signals() == [signal.SIGUSR1, signal.SIGUSR2]
    assert not awake(wakeup)


def test_a_signal_that_another_thread_receives(wakeup: Wakeup) -> None:
    """Only the interpreter's own write wakes the main thread then: the handler waits for it."""
    wakeup.catch([signal.SIGUSR1])
    ready, done = threading.Event(), threading.Event()

    def receive() -> None:
        ready.set()
        done.wait(PATIENCE)

    other = threading.Thread(target=receive)
    other.start()
    assert ready.wait(PATIENCE) and other.ident is not None
    signal.pthread_kill(other.ident, signal.SIGUSR1)
    epoll = select.epoll()
    epoll.register(wakeup.fileno(), select.EPOLLIN)
    assert epoll.poll(PATIENCE)
    epoll.close()
    done.set()
    other.join(PATIENCE)
    assert wakeup.signals() == [signal.SIGUSR1]


def test_more_wake_ups_than_fit_neither_block_nor_lose_a_signal(wakeup: Wakeup) -> None:
    for _ in range(5000):
        wakeup.notify()
    wakeup.notify(signal.SIGTERM)
    assert wakeup.signals() == [signal.SIGTERM]
    assert not awake(wakeup)


def test_catching_is_for_the_main_thread(wakeup: Wakeup) -> None:
    errors: list[BaseException] = []

    def catch() -> None:
        try:
            wakeup.catch([signal.SIGUSR1])
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=catch)
    thread.start()
    thread.join(PATIENCE)
    assert len(errors) == 1
