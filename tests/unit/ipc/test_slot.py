"""What a worker writes into its slot and sees of the others, and how many they let in together."""

import os
from typing import NoReturn

import pytest
from slots import TAKE, claimed, remotes, slots

from tproxy_relay.ipc.scoreboard import ABSENT, RESTING, WAITING, WATCHING, Numbers, Scoreboard
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.outcome import Outcome

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


# --- counts


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_is_counted_by_itself(outcome: Outcome) -> None:
    with slots(2) as (slot, other):
        slot.came()
        slot.came()
        other.came()
        slot.went(outcome)
        assert slot.numbers == Numbers(2, 1, {outcome.value: 1})
        assert other.numbers == Numbers(1, 1, {})
        assert (slot.state, other.state) == (ABSENT, ABSENT)


def test_others_wait(scoreboard: Scoreboard) -> None:
    slot, other = Slot(scoreboard, claimed(scoreboard)), Slot(scoreboard, claimed(scoreboard))
    for state, waits in ((WATCHING, False), (RESTING, False), (WAITING, True), (ABSENT, False)):
        other.state = state
        assert (other.state, slot.others_wait) == (state, waits)


# --- counts of texts


def test_what_others_count(scoreboard: Scoreboard) -> None:
    one, two, three = (Slot(scoreboard, claimed(scoreboard)) for _ in range(3))
    one.sources.add(one.scoreboard.digest("192.0.2.1"))
    two.sources.add(two.scoreboard.digest("192.0.2.1"))
    two.sources.add(two.scoreboard.digest("192.0.2.1"))
    two.sources.add(two.scoreboard.digest("192.0.2.2"))
    assert [slot.sources.elsewhere(slot.scoreboard.digest("192.0.2.1")) for slot in (one, two, three)] == [2, 1, 3]
    two.sources.remove(two.scoreboard.digest("192.0.2.1"))
    two.sources.remove(two.scoreboard.digest("192.0.2.2"))
    assert [slot.sources.elsewhere(slot.scoreboard.digest("192.0.2.1")) for slot in (one, two, three)] == [1, 1, 2]
    assert one.sources.elsewhere(one.scoreboard.digest("192.0.2.2")) == 0
    assert (
        one.accepted_flows.elsewhere(one.scoreboard.digest("192.0.2.1"))
        == one.opened_flows.elsewhere(one.scoreboard.digest("192.0.2.1"))
        == 0
    )


def test_as_many_texts_as_connections_find_room() -> None:
    with slots(2, 2_000) as (one, two):
        for number in range(2_000):
            one.sources.add(one.scoreboard.digest(f"client {number}"))
        assert (
            sum(two.sources.elsewhere(two.scoreboard.digest(f"client {number}")) == 1 for number in range(2_000))
            >= 1_999
        )


# --- admission


def fail() -> NoReturn:
    raise ZeroDivisionError


def test_so_many_and_no_more() -> None:
    with slots(1) as (slot,):
        for _ in range(5):
            with slot.admission(5) as admitted:
                assert admitted
                slot.came()
        with slot.admission(5) as admitted:
            assert not admitted
        slot.went(Outcome.COMPLETED)
        with slot.admission(5) as admitted:
            assert admitted


def test_of_all_workers_together() -> None:
    with slots(3) as (one, two, three):
        for slot in (one, two, three, one):
            with slot.admission(4) as admitted:
                assert admitted
                slot.came()
        for slot in (one, two, three):
            with slot.admission(4) as admitted:
                assert not admitted
        one.scoreboard.clear(1)
        with three.admission(4) as admitted:
            assert admitted, "those of a worker that is gone are gone"


def test_an_accept_that_brings_none_takes_no_room() -> None:
    with slots(2) as (one, two):
        for slot in (one, two) * 3:
            with slot.admission(1) as admitted:
                assert admitted
            with pytest.raises(ZeroDivisionError), slot.admission(1):
                fail()


def test_while_one_accepts_the_last_room_is_taken() -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does("admission = slot.admission(1); print(admission.__enter__())") == ["True"]
        with ours.admission(1) as admitted:
            assert not admitted
        remote.does("admission.__exit__(None, None, None)")
        with ours.admission(1) as admitted:
            assert admitted


def test_away_from_the_limit_nobody_waits_for_a_turn() -> None:
    with slots(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does(TAKE) == ["True"]
        with ours.admission(3) as admitted:
            assert admitted
        with ours.admission(1) as admitted:
            assert not admitted, "rather none than one too many"


HAMMER = (
    "import random, time\n"
    "def hammer(most, seconds, tokens, back):\n"
    "    chance, held, admitted, refused, toomany = random.Random(os.getpid()), 0, 0, 0, 0\n"
    "    end = time.monotonic() + seconds\n"
    "    while time.monotonic() < end:\n"
    "        if held and chance.random() < 0.5:\n"
    "            os.write(back, b'.'); slot.went('completed'); held -= 1\n"
    "            continue\n"
    "        with slot.admission(most) as mine:\n"
    "            if mine:\n"
    "                try: os.read(tokens, 1)\n"
    "                except BlockingIOError: toomany += 1\n"
    "                slot.came(); held += 1; admitted += 1\n"
    "        refused += not mine\n"
    "    print(admitted, refused, toomany)\n"
)


def test_several_processes_at_the_limit_never_let_too_many_in() -> None:
    """Counted by the kernel: whoever is let in takes a byte out of a pipe, and whoever leaves puts one back first."""
    most = 3
    tokens, back = os.pipe2(os.O_NONBLOCK)
    os.write(back, bytes(most))
    try:
        with slots(4) as workers, remotes(*workers) as all_of_them:
            for remote in all_of_them:
                ends = f"os.open('/proc/{os.getpid()}/fd/{tokens}', os.O_RDONLY | os.O_NONBLOCK)"
                ends += f", os.open('/proc/{os.getpid()}/fd/{back}', os.O_WRONLY)"
                remote.does(f"exec({HAMMER!r})")
                remote.begin(f"hammer({most}, 1.0, {ends})")
            said = [list(map(int, remote.said()[0].split())) for remote in all_of_them]
            assert sum(slot.live for slot in workers) <= most
        assert [toomany for _, _, toomany in said] == [0, 0, 0, 0]
        assert all(admitted for admitted, _, _ in said), said
        assert sum(refused for _, refused, _ in said) > 100, "they were at the limit"
    finally:
        os.close(tokens)
        os.close(back)


def test_in_the_end_all_room_is_taken() -> None:
    """Who was refused in the same moment as others gets in at the next try."""
    with slots(3) as workers, remotes(*workers) as all_of_them:
        for most in (1, 2, 7):
            for remote in all_of_them:
                remote.begin(
                    f"exec('import time\\nend = time.monotonic() + 0.2\\nwhile time.monotonic() < end:\\n"
                    f" with slot.admission({most}) as mine:\\n  if mine: slot.came()')"
                )
            for remote in all_of_them:
                remote.said()
            assert sum(slot.live for slot in workers) == most


# --- balance


@pytest.mark.parametrize(
    ("mine", "others", "fewer"),
    [
        (0, [0], False),
        (1, [1], False),
        (1, [0], True),
        (2, [1], False),
        (2, [0], True),
        (5, [3], False),
        (5, [2], True),
        (100, [91, 95, 300], False),
        (100, [95, 90, 300], True),
        (100, [], False),
    ],
)
def test_a_worker_with_clearly_fewer(mine: int, others: list[int], fewer: bool) -> None:
    with slots(1 + len(others), 1) as (ours, *theirs):
        for slot, live in zip((ours, *theirs), (mine, *others)):
            for _ in range(live):
                slot.came()
            slot.state = WATCHING
        assert ours.fewer_elsewhere(WATCHING) is fewer
        assert not ours.fewer_elsewhere(RESTING)
        for slot in theirs:
            slot.state = RESTING
        assert ours.fewer_elsewhere(RESTING) is fewer
        assert not ours.fewer_elsewhere(WATCHING)
