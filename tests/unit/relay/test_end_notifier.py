"""Who is woken when a connection has ended."""

import select
from collections.abc import Iterator

import pytest
import slots

from tproxy_relay.ipc.scoreboard import WAITING
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.system.wakeup import Wakeup


class Waiting:
    """A worker's notifier, and how one sees that its main thread or the other workers are woken."""

    def __init__(self, slot: Slot, other: Slot, wakeup: Wakeup) -> None:
        self.other = other
        self._wakeup = wakeup
        self._doorbell = slot.scoreboard.doorbell
        self.notifier = EndNotifier(slot, wakeup)

    def woken(self) -> tuple[bool, bool]:
        """By one end: this main thread, and the other workers, whose doorbell it is."""
        self.notifier.notify()
        poll = select.poll()
        poll.register(self._wakeup.fileno(), select.POLLIN)
        poll.register(self._doorbell, select.POLLIN)
        ready = dict(poll.poll(0))
        self._wakeup.clear()
        return self._wakeup.fileno() in ready, self._doorbell in ready


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    wakeup = Wakeup()
    with slots.slots(2) as (slot, other):
        yield Waiting(slot, other, wakeup)
    wakeup.close()


def test_where_nobody_waits_nobody_is_woken(waiting: Waiting) -> None:
    assert waiting.woken() == (False, False)
    assert not waiting.notifier.room_came


def test_a_worker_without_room_is_woken(waiting: Waiting) -> None:
    waiting.notifier.await_room()
    assert not waiting.notifier.room_came
    assert waiting.woken() == (True, False)
    assert waiting.notifier.room_came
    waiting.notifier.await_no_room()
    assert not waiting.notifier.room_came
    assert waiting.woken() == (False, False)


def test_room_of_the_last_time_is_forgotten(waiting: Waiting) -> None:
    waiting.notifier.await_room()
    waiting.notifier.notify()
    waiting.notifier.await_room()
    assert not waiting.notifier.room_came


def test_others_that_have_no_room_are_rung_for(waiting: Waiting) -> None:
    waiting.other.state = WAITING
    assert waiting.woken() == (False, True)


def test_what_a_worker_needs_itself_it_does_not_give_away(waiting: Waiting) -> None:
    waiting.other.state = WAITING
    waiting.notifier.await_room()
    assert waiting.woken() == (True, False)


def test_a_worker_that_leaves_is_woken_by_each(waiting: Waiting) -> None:
    waiting.notifier.all_awaited = True
    assert waiting.woken() == (True, False)
    waiting.other.state = WAITING
    assert waiting.woken() == (True, True)
