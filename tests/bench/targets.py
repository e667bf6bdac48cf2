"""What the relay must reach, and what it wants to: ratios of medians in one run, or plain figures."""

from typing import NamedTuple


class Target(NamedTuple):
    """`figure` of `cell`, divided by that of `peer` (None: as it is)."""

    cell: str
    figure: str
    peer: str | None
    must: float
    goal: float | None = None
    least: bool = True
    """True: at least so much; False: at most."""


_BULK = tuple(f"bulk{streams}-{direction}" for streams in (1, 4, 16) for direction in ("up", "down", "both"))

TARGETS = (
    *(
        target
        for cell in _BULK
        for target in (
            Target(cell, "rate", "direct", 0.85, 0.95),
            Target(cell, "rate", "haproxy", 2.2),
            Target(cell, "rate", "go", 1.3),
            Target(cell, "rate", "c", 0.95),
        )
    ),
    Target("rr1", "rate", "haproxy", 0.95, 1.1),
    Target("rr1", "rate", "c", 1.0),
    Target("rr1", "p99", "haproxy", 1.05, least=False),
    Target("rr1", "p99", "c", 1.0, least=False),
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
    Target("conn32", "p99", "haproxy", 2.0, least=False),
    Target("conn256", "rate", "haproxy", 0.65, 1.0),
    Target("conn256", "rate", "c", 1.1),
    Target("conn1-hogs", "rate", "haproxy", 0.8, 1.0),
    Target("mixed", "p99", "haproxy", 2.0, least=False),
    Target("idle5000", "rss_per_connection", None, 45 * 1024, 30 * 1024, least=False),
    Target("idle5000", "open_seconds", "haproxy", 2.5, least=False),
    Target("idle5000", "open_seconds", "c", 2.5, 1.0, least=False),
    Target("hold9000", "round_p99", "c", 1.5, 1.0, least=False),
    Target("hold9000", "unanswered", None, 0, least=False),
    Target("after-bulk", "rss_ratio", None, 1.1, least=False),
)
