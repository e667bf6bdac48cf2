"""A scoreboard of our own, with a slot for whoever needs one."""

from collections.abc import Iterator
from contextlib import contextmanager

from tproxy_relay.ipc.scoreboard import Scoreboard, Slot


@contextmanager
def slots(count: int = 1, connections: int = 100) -> Iterator[list[Slot]]:
    """So many slots, for workers that have at most so many connections each."""
    scoreboard = Scoreboard.create(connections)
    made = []
    try:
        for _ in range(count):
            number = scoreboard.claim()
            assert number is not None
            made.append(Slot(scoreboard, number))
        yield made
    finally:
        for slot in made:
            slot._row.release()
        scoreboard.close()
