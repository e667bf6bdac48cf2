"""How many connections a client opens within a second: a window that slides, over all workers."""

import time
from collections.abc import Iterator

import pytest
from slots import slots

from tproxy_relay.ipc.slot import Slot
from tproxy_relay.worker import rate_limit
from tproxy_relay.worker.rate_limit import RateLimit

HOST, OTHER = "192.0.2.1", "2001:db8::1"


class Clock:
    """What time.monotonic() says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(rate_limit, "time", made)
    return made


@pytest.fixture
def two_places() -> Iterator[list[Slot]]:
    with slots(2) as made:
        yield made


def admitted(
    workers: list[RateLimit], clock: Clock, tries: int, step: float, most: int, host: str = HOST
) -> list[float]:
    """When the tries that were admitted were made; each at another worker than the one before."""
    times = []
    for number in range(tries):
        if workers[number % len(workers)].admit(host, most):
            times.append(clock.now)
        clock.now += step
    return times


def test_no_more_than_so_many_at_once(two_places: list[Slot], clock: Clock) -> None:
    workers = list(map(RateLimit, two_places))
    assert len(admitted(workers, clock, 50, 0.0, 10)) == 10
    assert len(admitted(workers, clock, 50, 0.0, 10, OTHER)) == 10, "each for itself"
    clock.now += 2
    assert len(admitted(workers, clock, 50, 0.0, 10)) == 10, "all over again"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("start", [1000.0, 1000.37, 1000.99])
def test_whoever_does_not_stop_gets_the_rate(two_places: list[Slot], clock: Clock, start: float, workers: int) -> None:
    clock.now = start
    times = admitted(list(map(RateLimit, two_places[:workers])), clock, 10_000, 0.001, 20)
    assert 180 <= len(times) <= 220, "20 a second for 10 seconds"
    for first in range(len(times) - 40):
        assert times[first + 40] - times[first] > 1, "more than twice as many within a second"


def test_whoever_is_slower_never_notices(two_places: list[Slot], clock: Clock) -> None:
    assert len(admitted([RateLimit(two_places[0])], clock, 1000, 0.051, 20)) == 1000


def test_what_is_over_is_forgotten(two_places: list[Slot], clock: Clock) -> None:
    one = RateLimit(two_places[0])
    for _ in range(100):
        assert one.admit(HOST, 5)
        clock.now += 1
    assert one.debug_state()["seconds"] <= 3
    seconds, digest = range(1000, 1101), two_places[0].scoreboard.digest
    shared = [second for second in seconds if two_places[1].arrivals.elsewhere(digest(f"{HOST} {second}"))]
    assert shared
    assert len(shared) <= 3


def test_the_clock_is_the_same_for_all_workers() -> None:
    """CLOCK_MONOTONIC counts from the boot of the machine (clock_gettime(2)), not from the start of a process."""
    assert abs(time.monotonic() - time.clock_gettime(time.CLOCK_MONOTONIC)) < 1
