"""A board of our own, with a place for whoever needs one."""

from collections.abc import Iterator
from contextlib import contextmanager

from tproxy_relay.ipc.scoreboard import Board, Place


@contextmanager
def places(count: int = 1, connections: int = 100) -> Iterator[list[Place]]:
    """So many places, for workers that have at most so many connections each."""
    board = Board.create(connections)
    made = []
    try:
        for _ in range(count):
            number = board.claim()
            assert number is not None
            made.append(Place(board, number))
        yield made
    finally:
        for place in made:
            place._row.release()
        board.close()
