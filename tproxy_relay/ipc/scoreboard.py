"""What the processes of one relay know of each other: a piece of shared memory in which each worker has a slot.

A worker writes into its own slot and reads those of the others, so the numbers need no lock. Only the last free
connections under max-connections are given away in turns. The supervisor hands slots out and clears them; when a
worker is killed, its numbers are still there to be added up. This is the whole of it; what one worker does with its own
slot is in slot.py.

The memory is a file without a name (memfd_create(2)) that nobody can make shorter. Beside it is an eventfd(2) by
which a worker makes the others look again.
"""

import fcntl
import hashlib
import math
import mmap
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tproxy_relay.ipc import histogram, shared_counters
from tproxy_relay.ipc.histogram import CONNECT, DURATION, Histogram
from tproxy_relay.ipc.shared_counters import Table
from tproxy_relay.outcome import Outcome

SLOTS = 128
"""Workers that can be there at the same time, those included that finish their last connections."""

TURN_TIMEOUT = 0.05
"""Seconds to wait for one's turn: it takes a worker some microseconds, but one that is stopped has it for ever."""

# The words of a slot, of 8 bytes each. From CLOSED on, one for each outcome, in the order of OUTCOMES.
STATE, LIVE, RESERVED, BEAT, ACCEPTED, UP, DOWN, LOG_DROPPED, CLOSED = range(9)
OUTCOMES = tuple(Outcome)
# Where its histograms begin, each with microseconds, and then the counts.
CONNECT_AT = CLOSED + len(OUTCOMES)
DURATION_AT = CONNECT_AT + 1 + len(CONNECT) + 1
_WORDS = DURATION_AT + 1 + len(DURATION) + 1

# In the first page: words 0 and 1, and a key of 16 bytes.
_USED, _ENTRIES, _HASH_KEY = 0, 1, slice(64, 80)
_SLOTS_AT = mmap.PAGESIZE
_TABLES_AT = _SLOTS_AT + math.ceil(SLOTS * _WORDS * 8 / mmap.PAGESIZE) * mmap.PAGESIZE
_TABLES = 4

ABSENT, RESTING, WATCHING, WAITING = range(4)
"""What a worker does about new clients: none of its business (any more); leaves them to workers that have fewer;
takes them; has no room for them."""


class Numbers(NamedTuple):
    """Of one worker, or of several added up."""

    accepted: int
    live: int
    closed: dict[str, int]
    """By outcome."""

    def __add__(self, other: "Numbers") -> "Numbers":  # type: ignore[override]
        """Of both together: sum() takes a start for them."""
        closed = Counter(self.closed)
        closed.update(other.closed)
        return Numbers(self.accepted + other.accepted, self.live + other.live, dict(closed))


class Traffic(NamedTuple):
    """What the connections of one worker, or of several, have carried, and how long that took."""

    bytes_up: int
    """Passed to servers."""
    bytes_down: int
    """Passed to clients."""
    connect: Histogram
    """Of those upstream connections that came about."""
    duration: Histogram
    """Of connections that have ended."""
    log_dropped: int
    """Log records that were lost in the worker."""

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        """Of both together: sum() takes a start for them."""
        return Traffic(
            self.bytes_up + other.bytes_up,
            self.bytes_down + other.bytes_down,
            self.connect + other.connect,
            self.duration + other.duration,
            self.log_dropped + other.log_dropped,
        )


NO_NUMBERS = Numbers(0, 0, {})
NO_TRAFFIC = Traffic(0, 0, histogram.empty(CONNECT), histogram.empty(DURATION), 0)


class Scoreboard:
    """The memory, as each process maps it."""

    def __init__(self, memory: int, doorbell: int) -> None:
        """Of these two descriptors, which become the scoreboard's."""
        self._fd, self.doorbell = memory, doorbell
        self._map = mmap.mmap(memory, _TABLES_AT)
        self._words = memoryview(self._map).cast("Q")
        self._slots = self._words[_SLOTS_AT // 8 :]
        self._key = bytes(self._map[_HASH_KEY])
        self._tables_size = _size_of_tables(self._words[_ENTRIES])
        self._tables_map: mmap.mmap | None = None
        self._tables: dict[int, list[Table]] = {}
        self._turns = 0
        self._claimed: set[int] = set()
        self._rows: list[memoryview] = []

    @classmethod
    def create(cls, connections: int) -> "Scoreboard":
        """A new one, for workers that have so many connections each."""
        entries = shared_counters.WINDOW * max(1, math.ceil(3 * connections / shared_counters.WINDOW))
        fd = os.memfd_create("tproxy-relay", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, _TABLES_AT + SLOTS * _size_of_tables(entries))
        # A worker that was taken over by somebody must not be able to make the supervisor read beyond the end.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        os.pwrite(fd, secrets.token_bytes(16), _HASH_KEY.start)
        os.pwrite(fd, entries.to_bytes(8, "little"), 8 * _ENTRIES)
        return cls(fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))

    @property
    def descriptors(self) -> tuple[int, int]:
        """To be handed to another process, which makes its Scoreboard of them."""
        return self._fd, self.doorbell

    def ring(self) -> None:
        """Make the workers look again. Nobody reads the doorbell: an epoll with EPOLLET tells of each ring."""
        os.eventfd_write(self.doorbell, 1)

    def close(self) -> None:
        """Let the memory go. Slots of this scoreboard must not be used any more."""
        for tables in self._tables.values():
            for table in tables:
                table.release()
        if self._tables_map is not None:
            self._tables_map.close()
        for row in self._rows:
            row.release()
        self._slots.release()
        self._words.release()
        self._map.close()
        os.close(self._fd)
        os.close(self.doorbell)

    # --- for the supervisor

    def claim(self) -> int | None:
        """The number of a slot that nobody has, cleared; None if there is none."""
        number = next((number for number in range(SLOTS) if number not in self._claimed), None)
        if number is not None:
            self._claimed.add(number)
            self._words[_USED] = max(self._claimed) + 1
            self._slots[number * _WORDS + BEAT] = time.monotonic_ns()
        return number

    def clear(self, number: int) -> tuple[Numbers, Traffic]:
        """Give a slot back whose worker is gone. Returns what it had counted."""
        final = self.numbers(number), self.traffic(number)
        start = number * _WORDS
        for word in range(start, start + _WORDS):
            self._slots[word] = 0
        with mmap.mmap(self._fd, self._tables_size, offset=_TABLES_AT + number * self._tables_size) as tables:
            tables.madvise(mmap.MADV_REMOVE)  # reads as zeroes afterwards
        self._claimed.discard(number)
        self._words[_USED] = max(self._claimed, default=-1) + 1
        return final

    def numbers(self, number: int) -> Numbers:
        """What the worker of that slot has counted so far."""
        start = number * _WORDS
        # In this order: one that ends meanwhile is still live here, and none is there that was not accepted.
        counts = self._slots[start + CLOSED : start + CLOSED + len(OUTCOMES)].tolist()
        accepted = self._slots[start + ACCEPTED]
        closed = {outcome.value: count for outcome, count in zip(OUTCOMES, counts) if count}
        return Numbers(accepted, accepted - sum(counts), closed)

    def traffic(self, number: int) -> Traffic:
        """What the connections of that worker have carried so far."""
        start = number * _WORDS
        words = self._slots[start : start + _WORDS].tolist()
        connect, duration = (
            Histogram(bounds, tuple(words[at + 1 : at + 2 + len(bounds)]), words[at] / 1e6)
            for at, bounds in ((CONNECT_AT, CONNECT), (DURATION_AT, DURATION))
        )
        return Traffic(words[UP], words[DOWN], connect, duration, words[LOG_DROPPED])

    def silence(self, number: int) -> float:
        """Seconds since the worker of that slot last showed a sign of life."""
        return (time.monotonic_ns() - self._beat(number)) / 1e9

    def _beat(self, number: int) -> int:
        return self._slots[number * _WORDS + BEAT]

    # --- for the slots

    def column(self, word: int) -> list[int]:
        """The same word (STATE, LIVE ...) of each slot up to the last one in use, by number of the slot."""
        return self._slots[word : self._words[_USED] * _WORDS : _WORDS].tolist()

    def row(self, number: int) -> memoryview:
        """The words of one slot, to read and write: STATE, LIVE and so on are their indexes. `close` lets go of it."""
        self._rows.append(self._slots[number * _WORDS : (number + 1) * _WORDS])
        return self._rows[-1]

    def digest(self, text: str) -> bytes:
        """The key of a text in the tables of this scoreboard; nobody outside can find two texts with the same one."""
        return hashlib.blake2b(text.encode(), digest_size=shared_counters.KEY_BYTES, key=self._key).digest()

    def table(self, number: int, which: int) -> Table:
        """One of the tables of a slot."""
        if number not in self._tables:
            if self._tables_map is None:  # one for all of them: Python keeps a descriptor for each
                self._tables_map = mmap.mmap(self._fd, SLOTS * self._tables_size, offset=_TABLES_AT)
            size = self._words[_ENTRIES] * shared_counters.ENTRY_BYTES
            with memoryview(self._tables_map)[number * self._tables_size :] as own:
                self._tables[number] = [Table(own[index * size : (index + 1) * size]) for index in range(_TABLES)]
        return self._tables[number][which]

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Only one process at a time is in here, in one thread; it may come in again. The kernel lets the next one
        in when a process dies. False if the turn did not come within TURN_TIMEOUT seconds."""
        if not self._turns and not self._lock():
            yield False
            return
        self._turns += 1
        try:
            yield True
        finally:
            self._turns -= 1
            if not self._turns:
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)

    def _lock(self) -> bool:
        deadline = time.monotonic() + TURN_TIMEOUT
        while True:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
                return True
            except OSError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.0002)


def _size_of_tables(entries: int) -> int:
    return math.ceil(_TABLES * entries * shared_counters.ENTRY_BYTES / mmap.PAGESIZE) * mmap.PAGESIZE
