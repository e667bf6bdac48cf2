"""The pool: whoever holds a reservation has a thread, at once, and no thread is lost or left over."""

import random
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import children
import pytest
from deadlines import PATIENCE, wait_until

from tproxy_relay.relay.thread_pool import ThreadPool

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.fixture(autouse=True)
def default_stack() -> Iterator[None]:
    """ThreadPool sets the stack size of every later thread of the process."""
    yield
    threading.stack_size(0)


def pool_threads() -> list[threading.Thread]:
    """The threads of all pools in this process."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("relay")]


class Blockers:
    """Tasks that run until they are let go."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go = threading.Event()

    def task(self) -> None:
        """Hold its thread."""
        self.started.release()
        assert self.go.wait(PATIENCE)

    def await_started(self, count: int) -> None:
        """Return when so many hold a thread."""
        for _ in range(count):
            assert self.started.acquire(timeout=PATIENCE), "a task waits for a thread"


@pytest.fixture
def no_new_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """While the list is not empty, the system gives no thread. The exception is CPython's own."""
    refuse: list[bool] = []
    start = threading.Thread.start

    def maybe_start(thread: threading.Thread) -> None:
        if refuse:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", maybe_start)
    yield refuse


def test_the_spare_threads_are_there_from_the_beginning() -> None:
    threads = ThreadPool(limit=10, spare=4)
    assert len(pool_threads()) == 4
    threads.close()


def test_every_reserved_thread_is_there() -> None:
    threads, blockers = ThreadPool(limit=20, spare=2), Blockers()
    for _ in range(10):
        assert threads.reserve(2)
        threads.run(blockers.task)
        threads.run(blockers.task)
    blockers.await_started(20)
    blockers.go.set()
    threads.release(20)
    threads.close()


def test_a_reservation_uses_what_is_free_before_it_starts_more() -> None:
    threads = ThreadPool(limit=10, spare=4)
    assert threads.reserve(2)
    assert threads.reserve(2)
    assert len(pool_threads()) == 4
    assert threads.reserve(2)
    assert len(pool_threads()) == 8, "as many at a time as are kept"
    threads.release(6)
    assert threads.reserve(8)
    assert len(pool_threads()) == 8
    threads.release(8)
    threads.close()


def test_a_released_thread_serves_again() -> None:
    threads, names = ThreadPool(limit=2, spare=2), set()
    for _ in range(50):
        done = threading.Event()
        assert threads.reserve(1)

        def task(done: threading.Event = done) -> None:
            names.add(threading.current_thread().name)
            done.set()

        threads.run(task)
        assert done.wait(PATIENCE)
        threads.release(1)
    assert len(names) <= 2
    assert len(pool_threads()) == 2
    threads.close()


def test_a_task_that_raises_does_not_take_its_thread_along(caplog: pytest.LogCaptureFixture) -> None:
    def bug() -> None:
        raise ZeroDivisionError("a bug")

    threads, done = ThreadPool(limit=1, spare=1), threading.Event()
    assert threads.reserve(1)
    threads.run(bug)
    threads.run(done.set)
    assert done.wait(PATIENCE)
    assert "a bug" in caplog.text
    threads.release(1)
    threads.close()


def test_trim_lets_go_what_was_free_since_the_last_call() -> None:
    threads, blockers = ThreadPool(limit=20, spare=3), Blockers()
    assert threads.reserve(20)
    for _ in range(20):
        threads.run(blockers.task)
    blockers.await_started(20)
    assert not threads.trim()
    blockers.go.set()
    threads.release(20)
    assert threads.trim(), "there is something to trim, the next time"
    assert len(pool_threads()) == 20, "needed a moment ago"
    assert not threads.trim()
    wait_until(lambda: len(pool_threads()) == 3, "all but the spare ones end")
    assert not threads.trim()
    assert len(pool_threads()) == 3
    done = threading.Event()
    assert threads.reserve(2)
    threads.run(done.set)
    assert done.wait(PATIENCE)
    threads.release(2)
    threads.close()


def test_the_thread_objects_of_a_burst_are_not_held_by_the_threads_that_stay() -> None:
    """2,000 of them are 10 MB, and an executor holds all that it started."""
    threads, blockers = ThreadPool(limit=20, spare=3), Blockers()
    assert threads.reserve(20)
    for _ in range(20):
        threads.run(blockers.task)
    blockers.await_started(20)
    burst = [weakref.ref(thread) for thread in pool_threads()]
    blockers.go.set()
    threads.release(20)
    threads.trim()
    threads.trim()
    wait_until(lambda: len(pool_threads()) == 3, "all but the spare ones end")
    threads.close()
    assert sum(ref() is not None for ref in burst) <= 3, "the others are forgotten"


def test_trim_keeps_what_was_in_use_between_two_calls() -> None:
    threads = ThreadPool(limit=20, spare=0)
    assert threads.reserve(10)
    threads.release(10)
    threads.trim()
    assert threads.reserve(6)
    threads.release(6)
    threads.trim()
    wait_until(lambda: len(pool_threads()) <= 6, "four of ten end")
    assert len(pool_threads()) == 6
    threads.close()


def test_a_trim_beside_a_reservation_takes_no_thread_from_it() -> None:
    for _ in range(30):
        threads, blockers = ThreadPool(limit=8, spare=0), Blockers()
        assert threads.reserve(8)
        threads.release(8)
        threads.trim()
        assert threads.reserve(4)
        threads.trim()
        for _ in range(4):
            threads.run(blockers.task)
        blockers.await_started(4)
        blockers.go.set()
        threads.release(4)
        threads.close()


def test_close_ends_busy_threads_too_when_their_tasks_are_done() -> None:
    threads, blockers = ThreadPool(limit=4, spare=4), Blockers()
    assert threads.reserve(2)
    threads.run(blockers.task)
    threads.run(blockers.task)
    blockers.await_started(2)
    threads.close()
    wait_until(lambda: len(pool_threads()) == 2, "the free ones end")
    blockers.go.set()
    threads.release(2)
    wait_until(lambda: not pool_threads(), "the busy ones end")


def test_close_ends_threads_that_were_reserved_and_never_used() -> None:
    threads = ThreadPool(limit=4, spare=2)
    assert threads.reserve(2)
    threads.close()
    threads.release(2)
    wait_until(lambda: not pool_threads(), "all end")


# --- the system gives no more threads


def test_a_reservation_fails_when_a_thread_cannot_start(no_new_threads: list[bool]) -> None:
    threads = ThreadPool(limit=20, spare=2)
    no_new_threads.append(True)
    assert threads.reserve(2), "two are there"
    assert not threads.reserve(2)
    assert not threads.reserve(1)
    threads.release(2)
    assert threads.reserve(2), "and they are there again"
    no_new_threads.clear()
    assert threads.reserve(2)
    threads.release(4)
    threads.close()


def test_what_did_start_of_a_failed_reservation_stays_free(no_new_threads: list[bool]) -> None:
    threads = ThreadPool(limit=20, spare=1)
    no_new_threads.append(True)
    assert not threads.reserve(2)
    assert threads.reserve(1)
    no_new_threads.clear()
    threads.release(1)
    assert threads.reserve(2)
    assert len(pool_threads()) == 2
    threads.release(2)
    threads.close()


def test_a_failed_start_leaves_no_orphan_that_eats_a_task(no_new_threads: list[bool]) -> None:
    """The executor keeps the item of a submit() that raised, and one of its threads may run it later."""
    threads, blockers = ThreadPool(limit=40, spare=2), Blockers()
    for _ in range(5):
        no_new_threads.append(True)
        assert not threads.reserve(threads_in_use() + 2)
        no_new_threads.clear()
        assert threads.reserve(4)
    for _ in range(20):
        threads.run(blockers.task)
    blockers.await_started(20)
    assert len(pool_threads()) == 20
    blockers.go.set()
    threads.release(20)
    threads.close()


def threads_in_use() -> int:
    """More than are free."""
    return len(pool_threads())


def test_no_thread_at_all_at_the_start_is_survived(no_new_threads: list[bool]) -> None:
    no_new_threads.append(True)
    threads = ThreadPool(limit=4, spare=4)
    assert not threads.reserve(2)
    no_new_threads.clear()
    done = threading.Event()
    assert threads.reserve(2)
    threads.run(done.set)
    assert done.wait(PATIENCE)
    threads.release(2)
    threads.close()


STARVED = """
import os, pathlib, resource, threading
from tproxy_relay.relay.thread_pool import ThreadPool

if os.geteuid() == 0:  # whom RLIMIT_NPROC does not bind
    os.setgroups([])
    os.setresuid(*[61_000 + os.getpid() % 4000] * 3)
mine = 0
for status in pathlib.Path("/proc").glob("[0-9]*/status"):
    try:
        facts = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    except OSError:
        continue  # it has ended
    mine += int(facts["Threads"]) * (int(facts["Uid"].split()[0]) == os.getuid())
threads = ThreadPool(5000, spare=4)
resource.setrlimit(resource.RLIMIT_NPROC, (mine + 60, mine + 60))
pairs = 0
while pairs < 2000 and threads.reserve(2):
    pairs += 1
ran = threading.Semaphore(0)
for _ in range(2 * pairs):
    threads.run(ran.release)
assert all(ran.acquire(timeout=10) for _ in range(2 * pairs)), "a task has no thread"
threads.release(2 * pairs)
threads.close()
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(10)
assert threading.active_count() == 1, threading.enumerate()
assert 2 < pairs < 2000, pairs
print("survived")
"""


def test_a_real_lack_of_threads_is_survived() -> None:
    ran = children.run_python(STARVED)
    assert (ran.stdout, ran.returncode) == ("survived\n", 0), ran.stderr


# --- all at once


def test_stress_every_task_runs_once_and_promptly() -> None:
    """10,000 reservations from eight threads, with tasks of random length, while trim goes on."""
    threads = ThreadPool(limit=64, spare=4)
    runs: list[int] = []
    late: list[float] = []
    stop = threading.Event()

    def trimmer() -> None:
        while not stop.wait(0.01):
            threads.trim()

    def cycles(first: int) -> None:
        dice = random.Random(first)
        for number in range(first, first + 1250):
            assert threads.reserve(2)
            done = [threading.Event(), threading.Event()]
            handed_over = time.monotonic()

            def task(mine: threading.Event, number: int, pause: float, handed_over: float) -> None:
                late.append(time.monotonic() - handed_over)
                runs.append(number)
                if pause > 0.0009:
                    time.sleep(pause)
                mine.set()

            for one in done:
                pause = dice.random() / 1000

                def bound(one=one, number=number, pause=pause, handed_over=handed_over) -> None:  # type: ignore
                    task(one, number, pause, handed_over)

                threads.run(bound)
            for one in done:
                assert one.wait(PATIENCE), "a task was lost"
            threads.release(2)

    trimming = threading.Thread(target=trimmer)
    trimming.start()
    with ThreadPoolExecutor(8, thread_name_prefix="stress") as stress:
        for future in [stress.submit(cycles, first) for first in range(0, 10_000, 1250)]:
            future.result(60)
    stop.set()
    trimming.join(PATIENCE)
    assert sorted(runs) == sorted(list(range(10_000)) * 2)
    assert max(late) < 2
    threads.close()
    wait_until(lambda: not pool_threads(), "all end")
