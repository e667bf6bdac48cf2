"""What the relay must reach, and what it wants to: ratios to others in one run, or plain figures."""

from typing import NamedTuple


class Target(NamedTuple):
    """`figure` of `cell`, divided by that of `peer` (None: as it is)."""

    cell: str
    figure: str
    peer: str | None
    must: float | None
    goal: float | None = None
    least: bool = True
    """True: at least so much; False: at most."""
    enough: float | None = None
    """Of the plain figure: good enough, whatever that of the other is."""

    def reaches(self, value: float, wanted: float) -> bool:
        """If that is good enough."""
        return value >= wanted if self.least else value <= wanted


def _at_most(
    cell: str, figure: str, peer: str | None, must: float | None, goal: float | None = None, enough: float | None = None
) -> Target:
    return Target(cell, figure, peer, must, goal, False, enough)


_BULK = tuple(f"bulk{streams}-{direction}" for streams in (1, 4, 16) for direction in ("up", "down", "both"))

TARGETS = (
    *(
        target
        for cell in _BULK
        for target in (
            Target(cell, "throughput", "direct", 0.85, 0.95),
            Target(cell, "throughput", "haproxy", 2.2),
            Target(cell, "throughput", "go", 1.3),
            Target(cell, "throughput", "c", 0.95),
        )
    ),
    Target("rr1", "rate", "haproxy", 0.95, 1.1),
    Target("rr1", "rate", "c", 1.0),
    _at_most("rr1", "p99", "haproxy", 1 / 0.95, 1 / 1.1),
    _at_most("rr1", "p99", "c", 1.0),
    Target("rr32", "rate", "haproxy", 0.65, 1.0),
    Target("rr32", "rate", "go", 0.85),
    Target("rr32", "rate", "c", 0.95),
    Target("rr256", "rate", "haproxy", 0.5, 1.0),
    Target("rr256", "rate", "go", 0.75),
    Target("rr256", "rate", "c", 1.0),
    Target("rr2048", "rate", "haproxy", 0.45, 0.8),
    Target("rr2048", "rate", "c", 0.95),
    Target("conn32", "rate", "haproxy", 0.7, 1.0),
    Target("conn32", "rate", "go", 0.95),
    Target("conn32", "rate", "c", 1.1),
    _at_most("conn32", "p99", "haproxy", 2.0),
    Target("conn256", "rate", "haproxy", 0.65, 1.0),
    Target("conn256", "rate", "c", 1.1),
    Target("conn1-hogs", "rate", "haproxy", 0.8, 1.0),
    _at_most("mixed", "p99", "haproxy", 2.0),
    _at_most("idle5000", "rss_per_connection", None, 45 * 1024, 30 * 1024),
    _at_most("idle5000", "open_seconds", "haproxy", 2.5, enough=1.2),
    _at_most("idle5000", "open_seconds", "c", None, 1.0),
    _at_most("hold9000", "round_p99", "c", 1.5, 1.0),
    _at_most("hold9000", "unanswered", None, 0),
    _at_most("after-bulk", "rss_ratio", None, 1.1),
)
