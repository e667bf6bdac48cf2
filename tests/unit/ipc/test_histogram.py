"""Lengths of time, counted in buckets."""

import math

from tproxy_relay.ipc import histogram
from tproxy_relay.ipc.histogram import CONNECT, DURATION, Histogram, bucket

BOUNDS = (0.1, 1.0, 10.0)


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    """As Prometheus has it: le, less or equal."""
    assert [bucket(BOUNDS, seconds) for seconds in (0, 0.1, 0.11, 1.0, 10.0, 10.01)] == [0, 0, 1, 1, 2, 3]


def test_the_bounds_rise() -> None:
    for bounds in (CONNECT, DURATION):
        assert list(bounds) == sorted(set(bounds)) and bounds[0] > 0


def test_several_are_added_up() -> None:
    one, other = Histogram(BOUNDS, (1, 0, 2, 0), 3.5), Histogram(BOUNDS, (0, 0, 1, 7), 100.0)
    both = one + other + histogram.empty(BOUNDS)
    assert both == Histogram(BOUNDS, (1, 0, 3, 7), 103.5)
    assert both.total == 11


def test_quantiles() -> None:
    some = Histogram(BOUNDS, (1, 0, 8, 1), 50.0)
    assert [some.quantile(part) for part in (0.0, 0.1, 0.11, 0.5, 0.9, 0.91)] == [0.1, 0.1, 10.0, 10.0, 10.0, math.inf]
    assert histogram.empty(BOUNDS).quantile(0.5) is None
