"""One worker's slot of the scoreboard: what it writes there, and what it sees of the other workers.

The hot path of a worker is here: counting is a word or two of shared memory, without a lock and without a call.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tproxy_relay.ipc import histogram
from tproxy_relay.ipc.histogram import CONNECT, DURATION
from tproxy_relay.ipc.scoreboard import (
    ACCEPTED,
    BEAT,
    CLOSED,
    CONNECT_AT,
    DOWN,
    DURATION_AT,
    LIVE,
    LOG_DROPPED,
    OUTCOMES,
    RESERVED,
    STATE,
    UP,
    WAITING,
    Numbers,
    Scoreboard,
    Traffic,
)


class SharedCounters:
    """What one worker counts for the others to see, and what they count, by the keys of Scoreboard.digest."""

    def __init__(self, scoreboard: Scoreboard, number: int, which: int) -> None:
        self._scoreboard, self._number, self._which = scoreboard, number, which
        self._own = scoreboard.table(number, which)

    def add(self, key: bytes) -> None:
        """Count it once more, for this worker."""
        self._own.add(key)

    def remove(self, key: bytes) -> None:
        """Count it once less, for this worker; it is not an error if it is not there."""
        self._own.remove(key)

    def elsewhere(self, key: bytes) -> int:
        """How often the other workers have it."""
        count = 0
        for number, beat in enumerate(self._scoreboard.column(BEAT)):
            if beat and number != self._number:
                count += self._scoreboard.table(number, self._which).count(key)
        return count


class Slot:
    """The slot of one worker. Its methods are for that worker, in any of its threads one at a time."""

    def __init__(self, scoreboard: Scoreboard, number: int) -> None:
        self._scoreboard, self.number = scoreboard, number
        self._row = scoreboard.row(number)
        self._closed_words = {outcome.value: CLOSED + index for index, outcome in enumerate(OUTCOMES)}
        self.sources = SharedCounters(scoreboard, number, 0)
        self.accepted_flows = SharedCounters(scoreboard, number, 1)
        self.opened_flows = SharedCounters(scoreboard, number, 2)
        self.arrivals = SharedCounters(scoreboard, number, 3)

    @property
    def scoreboard(self) -> Scoreboard:
        """The scoreboard that this is a slot of."""
        return self._scoreboard

    def beat(self) -> None:
        """Show a sign of life: Scoreboard.silence begins anew."""
        self._row[BEAT] = time.monotonic_ns()

    def came(self) -> None:
        """Count a connection as accepted and live."""
        self._row[ACCEPTED] += 1
        self._row[LIVE] += 1

    def went(self, outcome: str) -> None:
        """Count a connection under its outcome (a value of Outcome), and no longer as live."""
        self._row[self._closed_words[outcome]] += 1
        self._row[LIVE] -= 1

    def carried(self, up: int, down: int) -> None:
        """Count bytes that were passed on: `up` to servers, `down` to clients."""
        self._row[UP] += up
        self._row[DOWN] += down

    def connected(self, seconds: float) -> None:
        """Count how long a connect() to a server took that came about."""
        self._time(CONNECT_AT, CONNECT, seconds)

    def lasted(self, seconds: float) -> None:
        """Count how long a connection lasted that has ended."""
        self._time(DURATION_AT, DURATION, seconds)

    def _time(self, at: int, bounds: tuple[float, ...], seconds: float) -> None:
        self._row[at] += int(seconds * 1e6)
        self._row[at + 1 + histogram.bucket(bounds, seconds)] += 1

    def log_dropped(self, count: int) -> None:
        """Set how many log records this worker has lost so far."""
        self._row[LOG_DROPPED] = count

    @property
    def traffic(self) -> Traffic:
        """What the connections of this worker have carried."""
        return self._scoreboard.traffic(self.number)

    @property
    def numbers(self) -> Numbers:
        """What this worker has counted: accepted, live, and closed by outcome."""
        return self._scoreboard.numbers(self.number)

    @property
    def state(self) -> int:
        """What this worker does about new clients: ABSENT, RESTING, WATCHING or WAITING of scoreboard.py."""
        return self._row[STATE]

    @state.setter
    def state(self, state: int) -> None:
        self._row[STATE] = state

    @property
    def live(self) -> int:
        """How many connections this worker has now."""
        return self._row[LIVE]

    @property
    def live_everywhere(self) -> int:
        """How many connections the whole relay has now."""
        return sum(self._scoreboard.column(LIVE))

    @property
    def accepted_everywhere(self) -> int:
        """Connections that the whole relay has accepted so far, but for workers that are gone."""
        return sum(self._scoreboard.column(ACCEPTED))

    @property
    def alone(self) -> bool:
        """True if this worker is the only one."""
        return sum(map(bool, self._scoreboard.column(BEAT))) < 2

    @property
    def others_wait(self) -> bool:
        """True if some worker wants to hear of connections that end."""
        return WAITING in self._scoreboard.column(STATE)

    @contextmanager
    def admission(self, most: int) -> Iterator[bool]:
        """Around the accept of one connection. False if the relay has `most` already."""
        self._row[RESERVED] = 1  # before the others are counted, so that they count us
        try:
            total, workers = self._total()
            if total + workers <= most:
                yield True  # even if all of them accept one now
                return
            with self._scoreboard.turn() as mine:
                yield mine and self._total()[0] <= most
        finally:
            self._row[RESERVED] = 0

    def _total(self) -> tuple[int, int]:
        live, reserved = self._scoreboard.column(LIVE), self._scoreboard.column(RESERVED)
        return sum(live) + sum(reserved), len(live)

    def fewer_elsewhere(self, state: int) -> bool:
        """True if a worker in that state has clearly fewer connections than this one: by more than chance would
        bring about where they come and go, but a first or second one is never left beside others."""
        mine = self._row[LIVE]
        if not mine:
            return False
        fewer = mine - math.isqrt(mine - 1)
        states, live = self._scoreboard.column(STATE), self._scoreboard.column(LIVE)
        return any(one == state and count < fewer for one, count in zip(states, live))
