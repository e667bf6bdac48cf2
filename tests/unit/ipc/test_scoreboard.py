"""The shared memory of the workers: slots, what processes see of each other, and turns."""

import fcntl
import mmap
import os
import select
import signal
import time
from pathlib import Path
from typing import NoReturn

import pytest
from deadlines import PATIENCE, wait_until
from slots import LEAVE, TAKE, claimed, remotes, slots

from tproxy_relay.ipc.scoreboard import (
    ABSENT,
    NO_TRAFFIC,
    SLOTS,
    TURN_TIMEOUT,
    WAITING,
    WATCHING,
    Numbers,
    Scoreboard,
)
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.outcome import Outcome
from tproxy_relay.system import limits

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


# --- slots


def test_a_slot_belongs_to_one_worker_until_it_is_cleared(scoreboard: Scoreboard) -> None:
    numbers = [claimed(scoreboard) for _ in range(SLOTS)]
    assert numbers == list(range(SLOTS))
    assert scoreboard.claim() is None
    scoreboard.clear(70)
    scoreboard.clear(3)
    assert [scoreboard.claim(), scoreboard.claim(), scoreboard.claim()] == [3, 70, None]


def test_the_numbers_of_a_worker_end_with_its_slot(scoreboard: Scoreboard) -> None:
    first, second = Slot(scoreboard, claimed(scoreboard)), Slot(scoreboard, claimed(scoreboard))
    for slot in (first, second):
        for _ in range(3):
            slot.came()
        slot.went(Outcome.COMPLETED)
        slot.sources.add(slot.scoreboard.digest("192.0.2.1"))
        slot.opened_flows.add(slot.scoreboard.digest("a flow"))
        slot.state = WAITING
    assert (first.live, first.live_everywhere, first.accepted_everywhere) == (2, 4, 6)
    second.carried(5, 70)
    second.connected(0.003)
    second.lasted(100_000.0)
    second.log_dropped(4)
    up, down, connect, duration, dropped = scoreboard.traffic(1)
    assert (up, down, dropped) == (5, 70, 4)
    assert (connect.quantile(0.5), connect.seconds) == (0.005, 0.003)
    assert (duration.quantile(0.5), duration.total) == (float("inf"), 1)
    assert scoreboard.clear(1) == (Numbers(3, 2, {"completed": 1}), (up, down, connect, duration, dropped))
    assert scoreboard.traffic(1) == NO_TRAFFIC
    assert (first.live, first.live_everywhere, first.accepted_everywhere) == (2, 2, 3)
    assert scoreboard.numbers(1) == Numbers(0, 0, {})
    first.state = WATCHING
    assert not first.others_wait
    again = Slot(scoreboard, claimed(scoreboard))
    assert (again.state, again.numbers) == (ABSENT, Numbers(0, 0, {}))
    assert first.sources.elsewhere(first.scoreboard.digest("192.0.2.1")) == 0
    assert first.opened_flows.elsewhere(first.scoreboard.digest("a flow")) == 0
    assert again.sources.elsewhere(again.scoreboard.digest("192.0.2.1")) == 1


def test_a_worker_shows_signs_of_life(scoreboard: Scoreboard) -> None:
    number = claimed(scoreboard)
    slot = Slot(scoreboard, number)
    assert scoreboard.silence(number) < 1, "it has until now to get ready"
    wait_until(lambda: scoreboard.silence(number) > 0.05, "time goes by")
    before = scoreboard.silence(number)
    slot.beat()
    assert scoreboard.silence(number) < before


# --- counts of texts


def test_nobody_outside_can_tell_which_texts_share_a_window(scoreboard: Scoreboard) -> None:
    """Or a client could fill it, and its other connections would not count for the other workers."""
    assert scoreboard.digest("192.0.2.1") == scoreboard.digest("192.0.2.1") != scoreboard.digest("192.0.2.2")
    another = Scoreboard.create(100)
    assert another.digest("192.0.2.1") != scoreboard.digest("192.0.2.1")
    another.close()


# --- the memory


@pytest.mark.parametrize("size", [0, mmap.PAGESIZE, 1 << 30])
def test_nobody_can_make_it_shorter_or_longer(scoreboard: Scoreboard, size: int) -> None:
    """Reading beyond the end of a file kills a process (SIGBUS): a worker could end the supervisor."""
    before = os.fstat(scoreboard.descriptors[0]).st_size
    with pytest.raises(PermissionError):
        os.ftruncate(scoreboard.descriptors[0], size)
    assert os.fstat(scoreboard.descriptors[0]).st_size == before
    assert scoreboard.clear(claimed(scoreboard)) == (Numbers(0, 0, {}), NO_TRAFFIC)


def test_nobody_can_seal_it_any_further(scoreboard: Scoreboard) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(scoreboard.descriptors[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_no_child_inherits_it_unasked(scoreboard: Scoreboard) -> None:
    assert not any(os.get_inheritable(fd) for fd in scoreboard.descriptors)


def test_looking_at_all_the_others_takes_few_descriptors(scoreboard: Scoreboard) -> None:
    """Each would be missing for a connection (limits.RESERVED_DESCRIPTORS)."""
    slot, *_ = [Slot(scoreboard, claimed(scoreboard)) for _ in range(SLOTS)]
    slot.sources.elsewhere(slot.scoreboard.digest("192.0.2.1"))
    names = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    assert sum(name.startswith("/memfd:tproxy-relay") for name in names) < limits.RESERVED_DESCRIPTORS / 2


def test_an_unused_slot_takes_no_memory() -> None:
    """The tables of 128 workers would be hundreds of megabytes."""
    scoreboard = Scoreboard.create(100_000)
    used = os.fstat(scoreboard.descriptors[0]).st_blocks * 512
    assert used < 100_000 < 100_000_000 < os.fstat(scoreboard.descriptors[0]).st_size
    slot = Slot(scoreboard, claimed(scoreboard))
    for number in range(1_000):
        slot.sources.add(slot.scoreboard.digest(str(number)))
    more = os.fstat(scoreboard.descriptors[0]).st_blocks * 512
    assert more > used + 1_000_000
    scoreboard.clear(slot.number)
    assert os.fstat(scoreboard.descriptors[0]).st_blocks * 512 < used + 100_000, "it is given back"
    scoreboard.close()


# --- between processes


def test_a_killed_worker_leaves_its_numbers() -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        remote.does(
            "slot.came(); slot.came(); slot.came(); slot.went('idle');"
            "slot.sources.add(slot.scoreboard.digest('a client'))"
        )
        assert remote.does("print(slot.numbers == scoreboard.numbers(1), slot.live_everywhere)") == ["True 2"]
        assert ours.sources.elsewhere(ours.scoreboard.digest("a client")) == 1
        remote.begin("while True: slot.came()")
        wait_until(lambda: theirs.live > 1_000, "it counts")
        remote.child.kill()
        remote.child.wait(PATIENCE)
        accepted, live, closed = ours.scoreboard.numbers(1)
        assert closed == {"idle": 1}
        assert accepted == live + 1 > 1_000
        assert ours.scoreboard.clear(1)[0] == (accepted, live, closed)


def test_a_worker_finds_the_digests_of_the_others() -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        ours.accepted_flows.add(ours.scoreboard.digest("a flow"))
        assert remote.does("print(slot.accepted_flows.elsewhere(slot.scoreboard.digest('a flow')))") == ["1"]
        assert remote.does(f"print(scoreboard.digest('x') == {ours.scoreboard.digest('x')!r})") == ["True"]


def test_a_ring_wakes_everybody_once() -> None:
    wait = (
        "import select; doorbell = select.epoll();"
        "doorbell.register(scoreboard.doorbell, select.EPOLLIN | select.EPOLLET)"
    )
    with slots(3) as (ours, *theirs), remotes(*theirs) as both, select.epoll() as doorbell:
        doorbell.register(ours.scoreboard.doorbell, select.EPOLLIN | select.EPOLLET)
        for remote in both:
            remote.does(wait)
        for ringer in (ours.scoreboard.ring, lambda: both[0].does("scoreboard.ring()"), ours.scoreboard.ring):
            ringer()
            for remote in both:
                assert remote.does("print(len(doorbell.poll(5)), len(doorbell.poll(0)))") == ["1 0"]
            assert (len(doorbell.poll(5)), len(doorbell.poll(0))) == (1, 0)


# --- turns


def test_it_is_one_process_turn_at_a_time() -> None:
    with slots(3) as (_ours, *theirs), remotes(*theirs) as (one, two):
        assert one.does(TAKE) == ["True"]
        assert two.does(TAKE) == ["False"], "not for ever, though the other one never ends it"
        two.does(LEAVE)
        assert one.does("with scoreboard.turn() as mine: print(mine)") == ["True"], "it may come in again"
        assert two.does(TAKE) == ["False"], "that has not ended the first one"
        two.does(LEAVE)
        one.does(LEAVE)
        assert two.does(TAKE) == ["True"]
        two.does(LEAVE)


def test_a_turn_is_waited_for_as_long_as_it_takes_a_worker() -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does(TAKE) == ["True"]
        began = time.monotonic()
        with ours.scoreboard.turn() as mine:
            assert not mine
        assert TURN_TIMEOUT <= time.monotonic() - began < PATIENCE
        for _ in range(20):  # on a busy machine it may end its turn too late
            remote.begin(f"import time; time.sleep({TURN_TIMEOUT / 5}); {LEAVE}")
            with ours.scoreboard.turn() as mine:
                pass
            remote.said()
            if mine:
                break
            assert remote.does(TAKE) == ["True"]
        assert mine


def test_a_bug_during_a_turn_ends_it() -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        with pytest.raises(ZeroDivisionError), ours.scoreboard.turn():
            fail()
        assert remote.does(TAKE) == ["True"]


def fail() -> NoReturn:
    raise ZeroDivisionError


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_has_the_turn_and_stands_still_or_dies(number: signal.Signals) -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does(TAKE) == ["True"]
        remote.child.send_signal(number)
        os.waitid(os.P_PID, remote.child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        with ours.scoreboard.turn() as mine:
            assert mine is (number == signal.SIGKILL)


def test_looking_up_what_others_count_does_not_end_a_turn() -> None:
    """fcntl(2): a process loses its lock when it closes any descriptor of the file."""
    with slots(3) as (_ours, *theirs), remotes(*theirs) as (one, two):
        assert one.does(TAKE) == ["True"]
        one.does("slot.sources.add(slot.scoreboard.digest('me')); slot.sources.elsewhere(slot.scoreboard.digest('me'))")
        assert two.does(TAKE) == ["False"]
