"""The shared memory of the workers: slots, what processes see of each other, and how many they let in together."""

import contextlib
import fcntl
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import children
import pytest
from deadlines import PATIENCE, wait_until
from slots import slots

from tproxy_relay.ipc import scoreboard as board_module
from tproxy_relay.ipc.scoreboard import (
    ABSENT,
    NO_TRAFFIC,
    RESTING,
    SLOTS,
    TURN_TIMEOUT,
    WAITING,
    WATCHING,
    Numbers,
    Scoreboard,
    Slot,
)
from tproxy_relay.outcome import Outcome
from tproxy_relay.system import limits

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

REMOTE = """
import os, sys
from tproxy_relay.ipc.scoreboard import Scoreboard, Slot
scoreboard = Scoreboard(int(sys.argv[1]), int(sys.argv[2]))
slot = Slot(scoreboard, int(sys.argv[3]))
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Remote:
    """A worker's process that does what it is told, in Python with `scoreboard` and `slot`."""

    def __init__(self, slot: Slot) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", REMOTE, *map(str, slot.scoreboard.descriptors), str(slot._number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=slot.scoreboard.descriptors,
            text=True,
            env=children.environment(),
        )

    def begin(self, code: str) -> None:
        """Have it begin with this line."""
        assert self.child.stdin is not None
        self.child.stdin.write(code + "\n")
        self.child.stdin.flush()

    def said(self) -> list[str]:
        """What it printed, once it has done that."""
        assert self.child.stdout is not None
        lines = []
        while (line := self.child.stdout.readline().strip()) != "done":
            assert line, "it has ended"
            lines.append(line)
        return lines

    def does(self, code: str) -> list[str]:
        """Begin and wait."""
        self.begin(code)
        return self.said()

    def close(self) -> None:
        """The end of it."""
        self.child.kill()
        self.child.wait(PATIENCE)
        with contextlib.suppress(BrokenPipeError):
            assert self.child.stdin is not None and self.child.stdout is not None
            self.child.stdout.close()
            self.child.stdin.close()


@contextlib.contextmanager
def remotes(*of: Slot) -> Iterator[list[Remote]]:
    """One for each of these slots, ready."""
    with contextlib.ExitStack() as stack:
        made = []
        for slot in of:
            made.append(Remote(slot))
            stack.callback(made[-1].close)
        for remote in made:
            remote.does("pass")
        yield made


@pytest.fixture
def scoreboard() -> Iterator[Scoreboard]:
    made = Scoreboard.create(100)
    yield made
    made.close()


def claimed(scoreboard: Scoreboard) -> int:
    number = scoreboard.claim()
    assert number is not None
    return number


# --- slots


def test_a_place_belongs_to_one_worker_until_it_is_cleared(scoreboard: Scoreboard) -> None:
    numbers = [claimed(scoreboard) for _ in range(SLOTS)]
    assert numbers == list(range(SLOTS))
    assert scoreboard.claim() is None
    scoreboard.clear(70)
    scoreboard.clear(3)
    assert [scoreboard.claim(), scoreboard.claim(), scoreboard.claim()] == [3, 70, None]


def test_the_numbers_of_a_worker_end_with_its_place(scoreboard: Scoreboard) -> None:
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


def test_a_worker_shows_signs_of_life(scoreboard: Scoreboard) -> None:
    number = claimed(scoreboard)
    slot = Slot(scoreboard, number)
    assert scoreboard.silence(number) < 1, "it has until now to get ready"
    wait_until(lambda: scoreboard.silence(number) > 0.05, "time goes by")
    before = scoreboard.silence(number)
    slot.beat()
    assert scoreboard.silence(number) < before


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


def test_nobody_outside_can_tell_which_texts_share_a_window(scoreboard: Scoreboard) -> None:
    """Or a client could fill it, and its other connections would not count for the other workers."""
    assert scoreboard.digest("192.0.2.1") == scoreboard.digest("192.0.2.1") != scoreboard.digest("192.0.2.2")
    another = Scoreboard.create(100)
    assert another.digest("192.0.2.1") != scoreboard.digest("192.0.2.1")
    another.close()


def test_as_many_texts_as_connections_find_room() -> None:
    with slots(2, 2_000) as (one, two):
        for number in range(2_000):
            one.sources.add(one.scoreboard.digest(f"client {number}"))
        assert (
            sum(two.sources.elsewhere(two.scoreboard.digest(f"client {number}")) == 1 for number in range(2_000))
            >= 1_999
        )


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


def test_an_unused_place_takes_no_memory() -> None:
    """The tables of 128 workers would be hundreds of megabytes."""
    scoreboard = Scoreboard.create(100_000)
    used = os.fstat(scoreboard.descriptors[0]).st_blocks * 512
    assert used < 100_000 < 100_000_000 < os.fstat(scoreboard.descriptors[0]).st_size
    slot = Slot(scoreboard, claimed(scoreboard))
    for number in range(1_000):
        slot.sources.add(slot.scoreboard.digest(str(number)))
    more = os.fstat(scoreboard.descriptors[0]).st_blocks * 512
    assert more > used + 1_000_000
    scoreboard.clear(slot._number)
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


TAKE = "turn = scoreboard.turn(); print(turn.__enter__())"
LEAVE = "turn.__exit__(None, None, None)"


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
            _raise()
        assert remote.does(TAKE) == ["True"]


def _raise() -> NoReturn:
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


# --- admission


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
                _raise()


def test_while_one_accepts_the_last_place_is_taken() -> None:
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


def test_in_the_end_all_places_are_taken() -> None:
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
            slot._row[board_module._LIVE] = live
            slot.state = WATCHING
        assert ours.fewer_elsewhere(WATCHING) is fewer
        assert not ours.fewer_elsewhere(RESTING)
        for slot in theirs:
            slot.state = RESTING
        assert ours.fewer_elsewhere(RESTING) is fewer
        assert not ours.fewer_elsewhere(WATCHING)
