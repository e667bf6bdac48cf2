"""How long things take, counted by length: so many up to 1 ms, so many up to 2.5 ms, and so on.

Such counts can be added up over workers and over time, which an average or a percentile cannot.
"""

from bisect import bisect_left
from collections.abc import Sequence
from operator import add
from typing import NamedTuple

CONNECT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds, the upper bounds for a connect(): from a server in the same rack to a timeout."""
DURATION = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0)
"""Seconds, those for a whole connection: from one request to a day."""


class Histogram(NamedTuple):
    """How many lengths of time fell into each bucket. Histograms with the same bounds can be added with `+`."""

    bounds: tuple[float, ...]
    """Seconds, rising; each one belongs to the bucket below it."""
    counts: tuple[int, ...]
    """Of each bucket by itself; one more than there are bounds, for what is longer than all of them."""
    seconds: float
    """All of them together."""

    @property
    def total(self) -> int:
        """How many lengths were counted, in all buckets together."""
        return sum(self.counts)

    def quantile(self, part: float) -> float | None:
        """A length that `part` of them (0 to 1) do not exceed, as far as the buckets tell: the upper bound of the one
        it falls into. None if there are none; infinity if it is longer than all bounds."""
        wanted, so_far = part * self.total, 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts):
            so_far += count
            if count and so_far >= wanted:
                return bound
        return None

    def __add__(self, other: "Histogram") -> "Histogram":  # type: ignore[override]
        """Of both together; they have the same bounds."""
        counts = tuple(map(add, self.counts, other.counts))
        return Histogram(self.bounds, counts, self.seconds + other.seconds)


def bucket(bounds: Sequence[float], seconds: float) -> int:
    """The index of the bucket that a length belongs to: 0 for up to the first bound, len(bounds) above the last."""
    return bisect_left(bounds, seconds)


def empty(bounds: tuple[float, ...]) -> Histogram:
    """A histogram with these bounds in which nothing is counted yet."""
    return Histogram(bounds, (0,) * (len(bounds) + 1), 0.0)
