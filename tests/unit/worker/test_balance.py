"""Which worker takes the next client: what one of them decides, and what becomes of it where several share."""

import math
import signal
import time
from pathlib import Path

import loopback
import pytest
import slots
from deadlines import wait_until
from workers import SERVED_BY_A_WAKE_UP, Several, median

from tproxy_relay.ipc import scoreboard
from tproxy_relay.worker.balance import DISTRUST, Balance

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_a_worker_with_clearly_more_than_one_that_watches_does_not_go_on() -> None:
    with slots.slots(2) as (slot, other):
        balance = Balance(slot)
        for _ in range(16):
            slot.came()
        assert balance.goes_on() and balance.is_needed(), "the other one is not there"
        other.beat()
        other.state = scoreboard.WATCHING
        assert not balance.goes_on() and not balance.is_needed()
        for _ in range(16):
            other.came()
        assert balance.goes_on()


def test_a_worker_that_leaves_counts_on_nobody_and_nobody_on_it() -> None:
    with slots.slots(2) as (slot, other):
        balance = Balance(slot)
        for _ in range(16):
            slot.came()
        other.state = scoreboard.WATCHING
        balance.show(scoreboard.WATCHING)
        assert slot.state == scoreboard.WATCHING
        balance.leave()
        assert balance.goes_on()
        balance.show(scoreboard.WATCHING)
        assert slot.state == scoreboard.ABSENT


def test_those_that_take_nobody_are_distrusted_for_a_while() -> None:
    with slots.slots(2) as (slot, other):
        balance = Balance(slot)
        for _ in range(16):
            slot.came()
        other.state = scoreboard.WATCHING
        balance.show(scoreboard.RESTING)
        balance.begin_rest()
        other.came()
        assert not balance.sample(), "it has taken one"
        assert balance.sample(), "and nobody since then"
        balance.distrust(time.monotonic())
        assert balance.is_needed()
        balance.distrust(time.monotonic() - DISTRUST)
        assert not balance.is_needed()


@pytest.mark.parametrize("workers", [1, 2])
def test_alone_a_worker_need_not_poll(workers: int) -> None:
    with slots.slots(workers) as made:
        assert (Balance(made[0]).poll_at is None) == (workers == 1)


# --- processes


def settled(several: Several) -> bool:
    """True if no worker rests that has clearly fewer than the busiest: those were rung for, and need their turn. But
    for such as leave the next clients to one that has still fewer."""
    live, states = several.live, several.states
    watching = [count for count, state in zip(live, states) if state == scoreboard.WATCHING]
    return not any(
        state == scoreboard.RESTING
        and is_clearly_fewer(count, max(live))
        and not any(is_clearly_fewer(one, count) for one in watching)
        for count, state in zip(live, states)
    )


def is_clearly_fewer(count: int, than: int) -> bool:
    """As Slot.fewer_elsewhere has it."""
    return bool(than) and count < than - math.isqrt(than - 1)


def bring_to_rest(several: Several) -> None:
    """The first worker leaves new clients to the second one, as soon as it has seen that it has more."""
    several.hold(0, 16)
    several.workers[1].stand_still()  # it would be the one that is woken
    several.connect()
    wait_until(lambda: several.states[0] == scoreboard.RESTING, "it rests")
    several.workers[1].child.send_signal(signal.SIGCONT)
    assert several.states == [scoreboard.RESTING, scoreboard.WATCHING]


def test_workers_share_the_clients_evenly() -> None:
    with Several(3) as several:
        for count in range(1, 61):
            several.connect()
            assert sum(several.live) == count
            wait_until(lambda: settled(several), "those that have fewer look for clients")
        assert min(several.live) >= 10 and max(several.live) <= 30, several.live


def test_a_worker_that_has_more_than_others_rests_and_the_next_clients_go_to_them_at_once() -> None:
    with Several() as several:
        bring_to_rest(several)
        before = several.live
        waits = []
        for _ in range(10):
            began = time.monotonic()
            several.connect()
            waits.append(time.monotonic() - began)
        assert several.live == [before[0], before[1] + 10]
        assert several.states == [scoreboard.RESTING, scoreboard.WATCHING]
        assert median(waits) < SERVED_BY_A_WAKE_UP


def test_a_worker_that_rested_takes_its_share_again_when_the_others_have_caught_up() -> None:
    with Several() as several:
        bring_to_rest(several)
        for _ in range(60):
            several.connect()
            wait_until(lambda: settled(several), "those that have fewer look for clients")
        assert abs(several.live[0] - several.live[1]) <= 12, several.live
        assert sum(several.live) == 77


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_rests_takes_over_when_the_others_can_take_nobody(how: signal.Signals) -> None:
    with Several() as several:
        bring_to_rest(several)
        several.workers[1].child.send_signal(how)
        before = several.live[0]
        waiting = [several.dial() for _ in range(10)]
        for client in waiting:
            client.sendall(b"me")
        began = time.monotonic()
        for _ in waiting:
            assert loopback.read_exactly(several.serve(), 2) == b"me"
        assert time.monotonic() - began < 1.5
        assert several.live[0] == before + 10


def test_a_worker_that_rests_sleeps() -> None:
    with Several() as several:
        bring_to_rest(several)

        status = Path(f"/proc/{several.workers[0].child.pid}/status")

        def switches() -> int:
            return int(status.read_text(encoding="ascii").split("voluntary_ctxt_switches:")[1].split()[0])

        before = switches()
        time.sleep(0.6)  # the length of the measurement
        assert switches() - before < 15


def test_when_the_others_have_gone_a_worker_that_rested_watches_again() -> None:
    with Several() as several:
        bring_to_rest(several)
        several.workers[1].leave()
        wait_until(lambda: several.states == [scoreboard.WATCHING, scoreboard.ABSENT], "the other one has left")
        before = several.live[0]
        several.connect()
        assert several.live[0] == before + 1
