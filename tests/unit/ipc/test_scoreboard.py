"""The shared memory of the workers: places, what processes see of each other, and how many they let in together."""

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
from places import places

from tproxy_relay.ipc import scoreboard as board_module
from tproxy_relay.ipc.scoreboard import (
    ABSENT,
    NO_TRAFFIC,
    PLACES,
    RESTING,
    TURN_PATIENCE,
    WAITING,
    WATCHING,
    Board,
    Numbers,
    Place,
)
from tproxy_relay.outcome import Outcome
from tproxy_relay.system import limits

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

REMOTE = """
import os, sys
from tproxy_relay.ipc.scoreboard import Board, Place
board = Board(int(sys.argv[1]), int(sys.argv[2]))
place = Place(board, int(sys.argv[3]))
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Remote:
    """A worker's process that does what it is told, in Python with `board` and `place`."""

    def __init__(self, place: Place) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-c", REMOTE, *map(str, place.board.descriptors), str(place._number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=place.board.descriptors,
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
def remotes(*of: Place) -> Iterator[list[Remote]]:
    """One for each of these places, ready."""
    with contextlib.ExitStack() as stack:
        made = []
        for place in of:
            made.append(Remote(place))
            stack.callback(made[-1].close)
        for remote in made:
            remote.does("pass")
        yield made


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(100)
    yield made
    made.close()


def claimed(board: Board) -> int:
    number = board.claim()
    assert number is not None
    return number


# --- places


def test_a_place_belongs_to_one_worker_until_it_is_cleared(board: Board) -> None:
    numbers = [claimed(board) for _ in range(PLACES)]
    assert numbers == list(range(PLACES))
    assert board.claim() is None
    board.clear(70)
    board.clear(3)
    assert [board.claim(), board.claim(), board.claim()] == [3, 70, None]


def test_the_numbers_of_a_worker_end_with_its_place(board: Board) -> None:
    first, second = Place(board, claimed(board)), Place(board, claimed(board))
    for place in (first, second):
        for _ in range(3):
            place.came()
        place.went(Outcome.COMPLETED)
        place.sources.add(place.board.digest("192.0.2.1"))
        place.opened_flows.add(place.board.digest("a flow"))
        place.state = WAITING
    assert (first.live, first.live_everywhere, first.accepted_everywhere) == (2, 4, 6)
    second.carried(5, 70)
    second.connected(0.003)
    second.lasted(100_000.0)
    second.log_dropped(4)
    up, down, connect, duration, dropped = board.traffic(1)
    assert (up, down, dropped) == (5, 70, 4)
    assert (connect.quantile(0.5), connect.seconds) == (0.005, 0.003)
    assert (duration.quantile(0.5), duration.total) == (float("inf"), 1)
    assert board.clear(1) == (Numbers(3, 2, {"completed": 1}), (up, down, connect, duration, dropped))
    assert board.traffic(1) == NO_TRAFFIC
    assert (first.live, first.live_everywhere, first.accepted_everywhere) == (2, 2, 3)
    assert board.numbers(1) == Numbers(0, 0, {})
    first.state = WATCHING
    assert not first.others_wait
    again = Place(board, claimed(board))
    assert (again.state, again.numbers) == (ABSENT, Numbers(0, 0, {}))
    assert first.sources.elsewhere(first.board.digest("192.0.2.1")) == 0
    assert first.opened_flows.elsewhere(first.board.digest("a flow")) == 0
    assert again.sources.elsewhere(again.board.digest("192.0.2.1")) == 1


@pytest.mark.parametrize("outcome", list(Outcome))
def test_every_outcome_is_counted_by_itself(outcome: Outcome) -> None:
    with places(2) as (place, other):
        place.came()
        place.came()
        other.came()
        place.went(outcome)
        assert place.numbers == Numbers(2, 1, {outcome.value: 1})
        assert other.numbers == Numbers(1, 1, {})
        assert (place.state, other.state) == (ABSENT, ABSENT)


def test_a_worker_shows_signs_of_life(board: Board) -> None:
    number = claimed(board)
    place = Place(board, number)
    assert board.silence(number) < 1, "it has until now to get ready"
    wait_until(lambda: board.silence(number) > 0.05, "time goes by")
    before = board.silence(number)
    place.beat()
    assert board.silence(number) < before


def test_others_wait(board: Board) -> None:
    place, other = Place(board, claimed(board)), Place(board, claimed(board))
    for state, waits in ((WATCHING, False), (RESTING, False), (WAITING, True), (ABSENT, False)):
        other.state = state
        assert (other.state, place.others_wait) == (state, waits)


# --- counts of texts


def test_what_others_count(board: Board) -> None:
    one, two, three = (Place(board, claimed(board)) for _ in range(3))
    one.sources.add(one.board.digest("192.0.2.1"))
    two.sources.add(two.board.digest("192.0.2.1"))
    two.sources.add(two.board.digest("192.0.2.1"))
    two.sources.add(two.board.digest("192.0.2.2"))
    assert [place.sources.elsewhere(place.board.digest("192.0.2.1")) for place in (one, two, three)] == [2, 1, 3]
    two.sources.remove(two.board.digest("192.0.2.1"))
    two.sources.remove(two.board.digest("192.0.2.2"))
    assert [place.sources.elsewhere(place.board.digest("192.0.2.1")) for place in (one, two, three)] == [1, 1, 2]
    assert one.sources.elsewhere(one.board.digest("192.0.2.2")) == 0
    assert (
        one.accepted_flows.elsewhere(one.board.digest("192.0.2.1"))
        == one.opened_flows.elsewhere(one.board.digest("192.0.2.1"))
        == 0
    )


def test_nobody_outside_can_tell_which_texts_share_a_window(board: Board) -> None:
    """Or a client could fill it, and its other connections would not count for the other workers."""
    assert board.digest("192.0.2.1") == board.digest("192.0.2.1") != board.digest("192.0.2.2")
    another = Board.create(100)
    assert another.digest("192.0.2.1") != board.digest("192.0.2.1")
    another.close()


def test_as_many_texts_as_connections_find_room() -> None:
    with places(2, 2_000) as (one, two):
        for number in range(2_000):
            one.sources.add(one.board.digest(f"client {number}"))
        assert sum(two.sources.elsewhere(two.board.digest(f"client {number}")) == 1 for number in range(2_000)) >= 1_999


# --- the memory


@pytest.mark.parametrize("size", [0, mmap.PAGESIZE, 1 << 30])
def test_nobody_can_make_it_shorter_or_longer(board: Board, size: int) -> None:
    """Reading beyond the end of a file kills a process (SIGBUS): a worker could end the supervisor."""
    before = os.fstat(board.descriptors[0]).st_size
    with pytest.raises(PermissionError):
        os.ftruncate(board.descriptors[0], size)
    assert os.fstat(board.descriptors[0]).st_size == before
    assert board.clear(claimed(board)) == (Numbers(0, 0, {}), NO_TRAFFIC)


def test_nobody_can_seal_it_any_further(board: Board) -> None:
    with pytest.raises(PermissionError):
        fcntl.fcntl(board.descriptors[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_no_child_inherits_it_unasked(board: Board) -> None:
    assert not any(os.get_inheritable(fd) for fd in board.descriptors)


def test_looking_at_all_the_others_takes_few_descriptors(board: Board) -> None:
    """Each would be missing for a connection (limits.RESERVED_DESCRIPTORS)."""
    place, *_ = [Place(board, claimed(board)) for _ in range(PLACES)]
    place.sources.elsewhere(place.board.digest("192.0.2.1"))
    names = map(os.path.realpath, Path("/proc/self/fd").iterdir())
    assert sum(name.startswith("/memfd:tproxy-relay") for name in names) < limits.RESERVED_DESCRIPTORS / 2


def test_an_unused_place_takes_no_memory() -> None:
    """The tables of 128 workers would be hundreds of megabytes."""
    board = Board.create(100_000)
    used = os.fstat(board.descriptors[0]).st_blocks * 512
    assert used < 100_000 < 100_000_000 < os.fstat(board.descriptors[0]).st_size
    place = Place(board, claimed(board))
    for number in range(1_000):
        place.sources.add(place.board.digest(str(number)))
    more = os.fstat(board.descriptors[0]).st_blocks * 512
    assert more > used + 1_000_000
    board.clear(place._number)
    assert os.fstat(board.descriptors[0]).st_blocks * 512 < used + 100_000, "it is given back"
    board.close()


# --- between processes


def test_a_killed_worker_leaves_its_numbers() -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
        remote.does(
            "place.came(); place.came(); place.came(); place.went('idle');"
            "place.sources.add(place.board.digest('a client'))"
        )
        assert remote.does("print(place.numbers == board.numbers(1), place.live_everywhere)") == ["True 2"]
        assert ours.sources.elsewhere(ours.board.digest("a client")) == 1
        remote.begin("while True: place.came()")
        wait_until(lambda: theirs.live > 1_000, "it counts")
        remote.child.kill()
        remote.child.wait(PATIENCE)
        accepted, live, closed = ours.board.numbers(1)
        assert closed == {"idle": 1}
        assert accepted == live + 1 > 1_000
        assert ours.board.clear(1)[0] == (accepted, live, closed)


def test_a_worker_finds_the_digests_of_the_others() -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
        ours.accepted_flows.add(ours.board.digest("a flow"))
        assert remote.does("print(place.accepted_flows.elsewhere(place.board.digest('a flow')))") == ["1"]
        assert remote.does(f"print(board.digest('x') == {ours.board.digest('x')!r})") == ["True"]


def test_a_ring_wakes_everybody_once() -> None:
    wait = "import select; bell = select.epoll(); bell.register(board.bell, select.EPOLLIN | select.EPOLLET)"
    with places(3) as (ours, *theirs), remotes(*theirs) as both, select.epoll() as bell:
        bell.register(ours.board.bell, select.EPOLLIN | select.EPOLLET)
        for remote in both:
            remote.does(wait)
        for ringer in (ours.board.ring, lambda: both[0].does("board.ring()"), ours.board.ring):
            ringer()
            for remote in both:
                assert remote.does("print(len(bell.poll(5)), len(bell.poll(0)))") == ["1 0"]
            assert (len(bell.poll(5)), len(bell.poll(0))) == (1, 0)


# --- turns


TAKE = "turn = board.turn(); print(turn.__enter__())"
LEAVE = "turn.__exit__(None, None, None)"


def test_it_is_one_process_turn_at_a_time() -> None:
    with places(3) as (_ours, *theirs), remotes(*theirs) as (one, two):
        assert one.does(TAKE) == ["True"]
        assert two.does(TAKE) == ["False"], "not for ever, though the other one never ends it"
        two.does(LEAVE)
        assert one.does("with board.turn() as mine: print(mine)") == ["True"], "it may come in again"
        assert two.does(TAKE) == ["False"], "that has not ended the first one"
        two.does(LEAVE)
        one.does(LEAVE)
        assert two.does(TAKE) == ["True"]
        two.does(LEAVE)


def test_a_turn_is_waited_for_as_long_as_it_takes_a_worker() -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does(TAKE) == ["True"]
        began = time.monotonic()
        with ours.board.turn() as mine:
            assert not mine
        assert TURN_PATIENCE <= time.monotonic() - began < PATIENCE
        for _ in range(20):  # on a busy machine it may end its turn too late
            remote.begin(f"import time; time.sleep({TURN_PATIENCE / 5}); {LEAVE}")
            with ours.board.turn() as mine:
                pass
            remote.said()
            if mine:
                break
            assert remote.does(TAKE) == ["True"]
        assert mine


def test_a_bug_during_a_turn_ends_it() -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
        with pytest.raises(ZeroDivisionError), ours.board.turn():
            _raise()
        assert remote.does(TAKE) == ["True"]


def _raise() -> NoReturn:
    raise ZeroDivisionError


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_has_the_turn_and_stands_still_or_dies(number: signal.Signals) -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does(TAKE) == ["True"]
        remote.child.send_signal(number)
        os.waitid(os.P_PID, remote.child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        with ours.board.turn() as mine:
            assert mine is (number == signal.SIGKILL)


def test_looking_up_what_others_count_does_not_end_a_turn() -> None:
    """fcntl(2): a process loses its lock when it closes any descriptor of the file."""
    with places(3) as (_ours, *theirs), remotes(*theirs) as (one, two):
        assert one.does(TAKE) == ["True"]
        one.does("place.sources.add(place.board.digest('me')); place.sources.elsewhere(place.board.digest('me'))")
        assert two.does(TAKE) == ["False"]


# --- admission


def test_so_many_and_no_more() -> None:
    with places(1) as (place,):
        for _ in range(5):
            with place.admission(5) as admitted:
                assert admitted
                place.came()
        with place.admission(5) as admitted:
            assert not admitted
        place.went(Outcome.COMPLETED)
        with place.admission(5) as admitted:
            assert admitted


def test_of_all_workers_together() -> None:
    with places(3) as (one, two, three):
        for place in (one, two, three, one):
            with place.admission(4) as admitted:
                assert admitted
                place.came()
        for place in (one, two, three):
            with place.admission(4) as admitted:
                assert not admitted
        one.board.clear(1)
        with three.admission(4) as admitted:
            assert admitted, "those of a worker that is gone are gone"


def test_an_accept_that_brings_none_takes_no_room() -> None:
    with places(2) as (one, two):
        for place in (one, two) * 3:
            with place.admission(1) as admitted:
                assert admitted
            with pytest.raises(ZeroDivisionError), place.admission(1):
                _raise()


def test_while_one_accepts_the_last_place_is_taken() -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
        assert remote.does("admission = place.admission(1); print(admission.__enter__())") == ["True"]
        with ours.admission(1) as admitted:
            assert not admitted
        remote.does("admission.__exit__(None, None, None)")
        with ours.admission(1) as admitted:
            assert admitted


def test_away_from_the_limit_nobody_waits_for_a_turn() -> None:
    with places(2) as (ours, theirs), remotes(theirs) as (remote,):
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
    "            os.write(back, b'.'); place.went('completed'); held -= 1\n"
    "            continue\n"
    "        with place.admission(most) as mine:\n"
    "            if mine:\n"
    "                try: os.read(tokens, 1)\n"
    "                except BlockingIOError: toomany += 1\n"
    "                place.came(); held += 1; admitted += 1\n"
    "        refused += not mine\n"
    "    print(admitted, refused, toomany)\n"
)


def test_several_processes_at_the_limit_never_let_too_many_in() -> None:
    """Counted by the kernel: whoever is let in takes a byte out of a pipe, and whoever leaves puts one back first."""
    most = 3
    tokens, back = os.pipe2(os.O_NONBLOCK)
    os.write(back, bytes(most))
    try:
        with places(4) as workers, remotes(*workers) as all_of_them:
            for remote in all_of_them:
                ends = f"os.open('/proc/{os.getpid()}/fd/{tokens}', os.O_RDONLY | os.O_NONBLOCK)"
                ends += f", os.open('/proc/{os.getpid()}/fd/{back}', os.O_WRONLY)"
                remote.does(f"exec({HAMMER!r})")
                remote.begin(f"hammer({most}, 1.0, {ends})")
            said = [list(map(int, remote.said()[0].split())) for remote in all_of_them]
            assert sum(place.live for place in workers) <= most
        assert [toomany for _, _, toomany in said] == [0, 0, 0, 0]
        assert all(admitted for admitted, _, _ in said), said
        assert sum(refused for _, refused, _ in said) > 100, "they were at the limit"
    finally:
        os.close(tokens)
        os.close(back)


def test_in_the_end_all_places_are_taken() -> None:
    """Who was refused in the same moment as others gets in at the next try."""
    with places(3) as workers, remotes(*workers) as all_of_them:
        for most in (1, 2, 7):
            for remote in all_of_them:
                remote.begin(
                    f"exec('import time\\nend = time.monotonic() + 0.2\\nwhile time.monotonic() < end:\\n"
                    f" with place.admission({most}) as mine:\\n  if mine: place.came()')"
                )
            for remote in all_of_them:
                remote.said()
            assert sum(place.live for place in workers) == most


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
    with places(1 + len(others), 1) as (ours, *theirs):
        for place, live in zip((ours, *theirs), (mine, *others)):
            place._row[board_module._LIVE] = live
            place.state = WATCHING
        assert ours.fewer_elsewhere(WATCHING) is fewer
        assert not ours.fewer_elsewhere(RESTING)
        for place in theirs:
            place.state = RESTING
        assert ours.fewer_elsewhere(RESTING) is fewer
        assert not ours.fewer_elsewhere(WATCHING)
