"""The workers' lines on their way to the one log: whole, in order, and never more of them than the log takes."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import lines as lines_module
import pytest
from deadlines import PATIENCE, wait_until

from tproxy_relay.logs.worker_pipes import CHUNK, LAST_WORDS, LogPipes, Words
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.settings import Settings


class Collector:
    """In the place of the LogWriter: keeps what it is given, or takes nothing while it is stuck."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.free = threading.Event()
        self.free.set()

    def pass_on(self, lines: bytes) -> None:
        """As LogWriter's."""
        self.free.wait()
        self.chunks.append(lines)

    @property
    def text(self) -> bytes:
        """All of it."""
        return b"".join(self.chunks)


@pytest.fixture
def log() -> Collector:
    return Collector()


@pytest.fixture
def pipes(log: Collector) -> Iterator[LogPipes]:
    """Nothing is left in them at the end."""
    made = LogPipes(log)  # type: ignore[arg-type]
    yield made
    log.free.set()
    made.drain(PATIENCE)
    assert made.debug_state()["open"] == 0, "a test has left a pipe open"
    made.close(PATIENCE)


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def worker(pipes: LogPipes) -> Iterator[tuple[int, int, Words]]:
    """The ends of one worker, closed at the end if they still are open."""
    log_end, words_end, words = pipes.add()
    stats = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (log_end, words_end)]
    try:
        yield log_end, words_end, words
    finally:
        for fd, stat in zip((log_end, words_end), stats):
            with suppress(OSError):
                if (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == stat:
                    os.close(fd)


# --- lines


def test_lines_arrive(pipes: LogPipes, log: Collector) -> None:
    with worker(pipes) as (log_end, _, _):
        os.write(log_end, b"one\ntwo\n")
        wait_until(lambda: log.text == b"one\ntwo\n", "they are passed on")
        os.write(log_end, b"three\n")
        wait_until(lambda: log.text == b"one\ntwo\nthree\n", "it is passed on")


def test_a_line_in_pieces_is_passed_on_when_it_is_whole(pipes: LogPipes, log: Collector) -> None:
    with worker(pipes) as (slow, _, _), worker(pipes) as (other, _, _):
        os.write(slow, b"half of")
        os.write(other, b"another\n")
        wait_until(lambda: log.text == b"another\n", "the other one's is passed on")
        os.write(slow, b" a line\nand half")
        wait_until(lambda: log.text == b"another\nhalf of a line\n", "it is whole")
        os.write(slow, b" of the next\n")
        wait_until(lambda: log.text.endswith(b"and half of the next\n"), "it is whole")


def test_lines_of_busy_workers_are_never_torn_or_mixed(pipes: LogPipes, log: Collector) -> None:
    """Also where a read ends in the middle of one."""
    count, each = 4, 3_000

    def write(number: int, fd: int) -> None:
        chance = random.Random(number)
        text = b"".join(b"%d %d %s\n" % (number, line, b"x" * chance.randrange(120)) for line in range(each))
        while text:
            piece = chance.randrange(1, 50_000)
            write_all(fd, text[:piece])
            text = text[piece:]
        os.close(fd)

    ends = [pipes.add()[:2] for _ in range(count)]
    threads = [threading.Thread(target=write, args=(number, end)) for number, (end, _) in enumerate(ends)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, words_end in ends:
        os.close(words_end)
    pipes.drain(PATIENCE)
    assert all(chunk.endswith(b"\n") for chunk in log.chunks)
    seen: dict[int, list[int]] = {number: [] for number in range(count)}
    for line in log.text.splitlines():
        number, index, *_ = line.split(b" ")
        seen[int(number)].append(int(index))
    assert seen == {number: list(range(each)) for number in range(count)}


def test_what_gathers_while_the_log_is_stuck_stays_whole(pipes: LogPipes, log: Collector) -> None:
    with worker(pipes) as (log_end, _, _):
        log.free.clear()
        os.write(log_end, b"first\n")
        data = b"".join(b"line %d\n" % number for number in range(40_000))
        assert len(data) > 5 * CHUNK
        write_all(log_end, data)
        log.free.set()
        wait_until(lambda: log.text == b"first\n" + data, "all is passed on")
        assert all(chunk.endswith(b"\n") and len(chunk) <= 2 * CHUNK for chunk in log.chunks)


def test_the_half_line_of_a_killed_worker_becomes_a_line(pipes: LogPipes, log: Collector) -> None:
    code = "import os, sys, time; os.write(1, b'whole\\nhal'); os.kill(os.getpid(), 9)"
    log_end, words_end, words = pipes.add()
    subprocess.run([sys.executable, "-c", code], stdout=log_end, stderr=words_end, check=False)
    with worker(pipes) as (other, _, _):
        os.close(log_end)
        os.close(words_end)
        wait_until(lambda: log.text == b"whole\nhal\n", "it is passed on")
        os.write(other, b"next\n")
        wait_until(lambda: log.text == b"whole\nhal\nnext\n", "it begins a line of its own")
    assert words.ended.wait(PATIENCE)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 10 * CHUNK + 7])
def test_an_endless_line_is_passed_on_in_pieces(pipes: LogPipes, log: Collector, length: int) -> None:
    with worker(pipes) as (log_end, _, _):
        write_all(log_end, b"x" * length + b"\nand an ordinary one\n")
        wait_until(lambda: log.text.endswith(b"\nand an ordinary one\n"), "all is passed on")
        *pieces, ordinary = log.text.splitlines()
        assert (b"".join(pieces), ordinary) == (b"x" * length, b"and an ordinary one")
        assert max(map(len, log.chunks)) <= 2 * CHUNK + 1
        assert len(pieces) <= 1 + 2 * length // CHUNK or length < CHUNK


# --- last words


def test_last_words_become_lines_of_the_supervisor(pipes: LogPipes, log: Collector) -> None:
    with lines_module.collected() as lines, worker(pipes) as (_, words_end, words):
        words.belong_to(4711)
        assert words.last == ""
        os.write(words_end, b"Traceback:\n  something\nValueError: no\xff good\nand half")
        wait_until(lambda: words.last == "ValueError: no\ufffd good", "whole lines are heard")
        assert not words.ended.is_set()
        os.close(words_end)
        assert words.ended.wait(PATIENCE)
        assert words.last == "and half"
        said = [lines_module.fields(record) for record in lines.of("a worker has said")]
        assert [one["text"] for one in said] == ["Traceback:", "  something", "ValueError: no\ufffd good", "and half"]
        assert {one["pid"] for one in said} == {4711}
        assert not log.chunks, "they are no lines of the log yet"


def test_only_the_last_of_many_words_are_kept(pipes: LogPipes) -> None:
    with lines_module.collected() as lines, worker(pipes) as (_, words_end, words):
        write_all(words_end, b"".join(b"word %d\n" % number for number in range(3 * LAST_WORDS)))
        os.close(words_end)
        assert words.ended.wait(PATIENCE)
        assert len(lines.of("a worker has said")) == 3 * LAST_WORDS
        assert list(words.lines) == [f"word {number}" for number in range(2 * LAST_WORDS, 3 * LAST_WORDS)]


# --- the end


def test_drain_waits_for_the_last_line(pipes: LogPipes, log: Collector) -> None:
    log_end, words_end, _ = pipes.add()
    os.write(log_end, b"a\n" * 10_000)
    log.free.clear()
    os.close(log_end)
    os.close(words_end)
    threading.Timer(0.05, log.free.set).start()
    pipes.drain(PATIENCE)
    assert log.text == b"a\n" * 10_000


def test_drain_does_not_wait_for_ever(pipes: LogPipes, log: Collector) -> None:
    """For a worker that cannot be killed, or a log that takes nothing."""
    with worker(pipes):
        began = time.monotonic()
        pipes.drain(0.05)
        assert 0.04 < time.monotonic() - began < PATIENCE
    pipes.drain(PATIENCE)
    began = time.monotonic()
    pipes.drain(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2, "without workers there is nothing to wait for"


def test_workers_come_and_go(pipes: LogPipes, log: Collector) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(30):
        with worker(pipes) as (log_end, _, words):
            os.write(log_end, b"%d\n" % number)
        assert words.ended.wait(PATIENCE)
    pipes.drain(PATIENCE)
    assert log.text.split() == [b"%d" % number for number in range(30)]
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before, "all is closed")


def test_no_other_process_inherits_an_end(pipes: LogPipes) -> None:
    """Else a worker's end would be noticed only when the others have ended, too."""
    with worker(pipes) as (log_end, words_end, _):
        assert not os.get_inheritable(log_end) and not os.get_inheritable(words_end)


# --- backpressure


def taken(fd: int, still: Callable[[], object] = lambda: True) -> int:
    """Bytes of lines that go into a pipe until nothing has gone in for a while."""
    os.set_blocking(fd, False)
    line, count, since = b"x" * 999 + b"\n", 0, time.monotonic()
    while still() and time.monotonic() - since < 0.3:
        try:
            count += os.write(fd, line)
            since = time.monotonic()
        except BlockingIOError:
            time.sleep(0.001)
        assert count < 1 << 28, "no end to what is taken"
    os.set_blocking(fd, True)
    return count


def test_nothing_is_read_while_the_log_is_stuck(pipes: LogPipes, log: Collector) -> None:
    log.free.clear()
    with worker(pipes) as (one, _, _), worker(pipes) as (other, _, _):
        os.write(one, b"stuck\n")
        count = taken(other)
        assert 0 < count < 4 << 20, "a pipe, and what was read of it"
        log.free.set()
        wait_until(lambda: len(log.text) == count + 6, "all is passed on after all")


@pytest.mark.usefixtures("root_logger_as_before")
def test_a_log_that_nobody_reads_costs_no_memory() -> None:
    """With the real writer: what is kept is a few megabytes, and nothing of it is lost."""
    reader, sink = os.pipe()
    writer = LogWriter(Settings(log_format="json"), sink)
    writer.start()
    pipes = LogPipes(writer)
    log_end, words_end, _ = pipes.add()
    try:
        count = taken(log_end)
        assert count < 8 << 20
        os.close(log_end)
        os.close(words_end)
        got = 0
        while got < count:
            data = os.read(reader, 1 << 20)
            assert set(data) <= set(b"x\n")
            got += len(data)
        pipes.drain(PATIENCE)
        assert (got, writer.dropped) == (count, 0)
    finally:
        pipes.close(PATIENCE)
        writer.stop(PATIENCE)
        os.close(reader)
        os.close(sink)
