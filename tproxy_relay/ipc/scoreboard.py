"""What the processes of one relay know of each other: a piece of shared memory in which each worker has a slot.

A worker writes into its own slot and reads those of the others, so the numbers need no lock. Only the last free
connections under max-connections are given away in turns. The supervisor hands slots out and clears them; when a
worker is killed, its numbers are still there to be added up.

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

# A slot is so many words of 8 bytes.
_STATE, _LIVE, _RESERVED, _BEAT, _ACCEPTED, _UP, _DOWN, _LOG_DROPPED, _CLOSED = range(9)
_OUTCOMES = tuple(Outcome)
# Of each histogram: microseconds, and the counts.
_CONNECT = _CLOSED + len(_OUTCOMES)
_DURATION = _CONNECT + 1 + len(CONNECT) + 1
_WORDS = _DURATION + 1 + len(DURATION) + 1

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
            self._slots[number * _WORDS + _BEAT] = time.monotonic_ns()
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
        counts = self._slots[start + _CLOSED : start + _CLOSED + len(_OUTCOMES)].tolist()
        accepted = self._slots[start + _ACCEPTED]
        closed = {outcome.value: count for outcome, count in zip(_OUTCOMES, counts) if count}
        return Numbers(accepted, accepted - sum(counts), closed)

    def traffic(self, number: int) -> Traffic:
        """What the connections of that worker have carried so far."""
        start = number * _WORDS
        words = self._slots[start : start + _WORDS].tolist()
        connect, duration = (
            Histogram(bounds, tuple(words[at + 1 : at + 2 + len(bounds)]), words[at] / 1e6)
            for at, bounds in ((_CONNECT, CONNECT), (_DURATION, DURATION))
        )
        return Traffic(words[_UP], words[_DOWN], connect, duration, words[_LOG_DROPPED])

    def silence(self, number: int) -> float:
        """Seconds since the worker of that slot last showed a sign of life."""
        return (time.monotonic_ns() - self._beat(number)) / 1e9

    def _beat(self, number: int) -> int:
        return self._slots[number * _WORDS + _BEAT]

    # --- for the slots

    def column(self, word: int) -> list[int]:
        """That word of all slots in use."""
        return self._slots[word : self._words[_USED] * _WORDS : _WORDS].tolist()

    def row(self, number: int) -> memoryview:
        """The words of one slot."""
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


class SharedCounters:
    """What one worker counts for the others to see, and what they count, by the keys of Scoreboard.digest."""

    def __init__(self, scoreboard: Scoreboard, number: int, which: int) -> None:
        self._scoreboard, self._number, self._which = scoreboard, number, which
        self._own = scoreboard.table(number, which)

    def add(self, key: bytes) -> None:
        """Count it once more, for this worker."""
        self._own.add(key)

    def remove(self, key: bytes) -> None:
        """Count it once less."""
        self._own.remove(key)

    def elsewhere(self, key: bytes) -> int:
        """How often the other workers have it."""
        count = 0
        for number, beat in enumerate(self._scoreboard.column(_BEAT)):
            if beat and number != self._number:
                count += self._scoreboard.table(number, self._which).count(key)
        return count


class Slot:
    """One worker's. Its methods are for that worker, in any of its threads one at a time."""

    def __init__(self, scoreboard: Scoreboard, number: int) -> None:
        self._scoreboard, self._number = scoreboard, number
        self._row = scoreboard.row(number)
        self._closed_words = {outcome.value: _CLOSED + index for index, outcome in enumerate(_OUTCOMES)}
        self.sources = SharedCounters(scoreboard, number, 0)
        self.accepted_flows = SharedCounters(scoreboard, number, 1)
        self.opened_flows = SharedCounters(scoreboard, number, 2)
        self.arrivals = SharedCounters(scoreboard, number, 3)

    @property
    def scoreboard(self) -> Scoreboard:
        """The one that it is a slot of."""
        return self._scoreboard

    def beat(self) -> None:
        """Show a sign of life."""
        self._row[_BEAT] = time.monotonic_ns()

    def came(self) -> None:
        """A connection was accepted."""
        self._row[_ACCEPTED] += 1
        self._row[_LIVE] += 1

    def went(self, outcome: str) -> None:
        """One has ended."""
        self._row[self._closed_words[outcome]] += 1
        self._row[_LIVE] -= 1

    def carried(self, up: int, down: int) -> None:
        """So many bytes more were passed on, each way."""
        self._row[_UP] += up
        self._row[_DOWN] += down

    def connected(self, seconds: float) -> None:
        """A connect() to a server took so long."""
        self._time(_CONNECT, CONNECT, seconds)

    def lasted(self, seconds: float) -> None:
        """So long did a connection last."""
        self._time(_DURATION, DURATION, seconds)

    def _time(self, at: int, bounds: tuple[float, ...], seconds: float) -> None:
        self._row[at] += int(seconds * 1e6)
        self._row[at + 1 + histogram.bucket(bounds, seconds)] += 1

    def log_dropped(self, count: int) -> None:
        """So many log records were lost so far."""
        self._row[_LOG_DROPPED] = count

    @property
    def traffic(self) -> Traffic:
        """What the connections of this worker have carried."""
        return self._scoreboard.traffic(self._number)

    @property
    def numbers(self) -> Numbers:
        """What this worker has counted."""
        return self._scoreboard.numbers(self._number)

    @property
    def state(self) -> int:
        """ABSENT, RESTING, WATCHING or WAITING."""
        return self._row[_STATE]

    @state.setter
    def state(self, state: int) -> None:
        self._row[_STATE] = state

    @property
    def live(self) -> int:
        """Connections of this worker."""
        return self._row[_LIVE]

    @property
    def live_everywhere(self) -> int:
        """Connections of the whole relay."""
        return sum(self._scoreboard.column(_LIVE))

    @property
    def accepted_everywhere(self) -> int:
        """Connections that the whole relay has accepted so far, but for workers that are gone."""
        return sum(self._scoreboard.column(_ACCEPTED))

    @property
    def alone(self) -> bool:
        """True if this worker is the only one."""
        return sum(map(bool, self._scoreboard.column(_BEAT))) < 2

    @property
    def others_wait(self) -> bool:
        """True if some worker wants to hear of connections that end."""
        return WAITING in self._scoreboard.column(_STATE)

    @contextmanager
    def admission(self, most: int) -> Iterator[bool]:
        """Around the accept of one connection. False if the relay has `most` already."""
        self._row[_RESERVED] = 1  # before the others are counted, so that they count us
        try:
            total, workers = self._total()
            if total + workers <= most:
                yield True  # even if all of them accept one now
                return
            with self._scoreboard.turn() as mine:
                yield mine and self._total()[0] <= most
        finally:
            self._row[_RESERVED] = 0

    def _total(self) -> tuple[int, int]:
        live, reserved = self._scoreboard.column(_LIVE), self._scoreboard.column(_RESERVED)
        return sum(live) + sum(reserved), len(live)

    def fewer_elsewhere(self, state: int) -> bool:
        """True if a worker in that state has clearly fewer connections than this one: by more than chance would
        bring about where they come and go, but a first or second one is never left beside others."""
        mine = self._row[_LIVE]
        if not mine:
            return False
        fewer = mine - math.isqrt(mine - 1)
        states, live = self._scoreboard.column(_STATE), self._scoreboard.column(_LIVE)
        return any(one == state and count < fewer for one, count in zip(states, live))


def _size_of_tables(entries: int) -> int:
    return math.ceil(_TABLES * entries * shared_counters.ENTRY_BYTES / mmap.PAGESIZE) * mmap.PAGESIZE
