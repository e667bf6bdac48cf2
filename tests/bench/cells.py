"""What is measured: each cell is a row of the tables, one kind of work, done by one relay at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from peers import DEFAULT, Variant
from work import Work, beside_bulk, beside_hogs, bulk, connects, idle, idle_after_bulk, requests

LATENCIES = ("rate", "p99")
BULK, RATE, P99 = "throughput", "rate", "p99"


@dataclass(frozen=True)
class Cell:
    """`shown` are the figures in the tables, the most important one first."""

    name: str
    what: str
    group: str
    work: Work
    shown: tuple[str, ...]
    connections: int = 0
    """At the same time, if there are so many that not everybody can hold them."""
    variant: Variant = DEFAULT
    """How the relays run."""
    fresh: bool = False
    """Relays must have done nothing before."""

    @property
    def main(self) -> str:
        """Its most important figure."""
        return self.shown[0]


STREAMS = (1, 4, 16)
DIRECTIONS = {"up": "up", "down": "down", "both": "each way"}
CURVE = (1, 2, 8, 32, 128, 512, 2048, 5000, 9000)
ON_DEMAND = ("curve", "processors")
"""Groups that are measured only when they are asked for."""


def _bulk() -> Iterator[Cell]:
    for streams in STREAMS:
        for direction, words in DIRECTIONS.items():
            what = f"{streams} stream{'s' if streams > 1 else ''} {words}"
            yield Cell(f"bulk{streams}-{direction}", what, "bulk", bulk(streams, direction), (BULK,))


def _requests() -> Iterator[Cell]:
    for count in (1, 32, 256, 2048):
        what = f"requests, {count:,} connection{'s' if count > 1 else ''}"
        yield Cell(f"rr{count}", what, "rr", requests(count), LATENCIES, count)
    yield Cell("rr32-16k", "requests, 32 connections, 16 KiB back", "rr", requests(32, 16384), LATENCIES)
    what = "5,000 requests/s on 32 connections"
    yield Cell("fixed32", what, "fixed", requests(32, rate=5000), (P99, "p50"))
    what = "2,000 requests/s on 200 connections, beside 2 streams"
    mixed = beside_bulk(2, requests(200, rate=2000))
    yield Cell("mixed", what, "fixed", mixed, (P99, "p50", "beside_throughput"))


def _connects() -> Iterator[Cell]:
    yield Cell("conn1", "new connections, one at a time", "conn", connects(1, "server"), LATENCIES)
    for count in (32, 256):
        yield Cell(f"conn{count}", f"new connections, {count} at once", "conn", connects(count, "server"), LATENCIES)
    yield Cell("conn32-client", "the same, 32, the client closes first", "conn", connects(32, "client"), LATENCIES)
    yield Cell("conn32-reset", "the same, 32, the client resets", "conn", connects(32, "reset"), LATENCIES)
    hogs = beside_hogs(2, connects(1, "server"))
    yield Cell("conn1-hogs", "new connections, one at a time, 2 hogs", "conn", hogs, LATENCIES)


def _idle() -> Iterator[Cell]:
    figures: tuple[str, ...] = ("rss_per_connection", "open_seconds", "round_p99")
    for count in (1000, 5000):
        yield Cell(f"idle{count}", f"{count:,} idle connections", "idle", idle(count), figures, count, fresh=True)
    what = "9,000 connections held, and each asked once"
    yield Cell("hold9000", what, "idle", idle(9000), ("round_p99", "open_seconds", "unanswered"), 9000, fresh=True)
    what = "memory of 200 connections after 16 MiB in each, against before"
    yield Cell("after-bulk", what, "idle", idle_after_bulk(200, 16), ("rss_ratio",), fresh=True)


def _others() -> Iterator[Cell]:
    """The three basic kinds of work, in other circumstances."""
    kinds: list[tuple[str, str, Callable[[int], Work], tuple[str, ...]]] = [
        ("bulk1-up", "1 stream up", lambda family: bulk(1, "up", family), (BULK,)),
        ("rr32", "requests, 32 connections", lambda family: requests(32, family=family), LATENCIES),
        ("conn32", "new connections, 32 at once", lambda family: connects(32, "server", family), LATENCIES),
    ]
    for name, what, work, shown in kinds:
        yield Cell(f"{name}-v6", f"{what}, IPv6", "v6", work(6), shown)
    for name, what, work, shown in kinds:
        keeps = Variant(preserving=True)
        yield Cell(f"{name}-source", f"{what}, source preserved", "source", work(4), shown, variant=keeps)
    for name, what, work, shown in kinds:
        for number in (1, 2, 4):
            variant = Variant(processors=number)
            what_of = f"{what}, {number} worker{'s' if number > 1 else ''}"
            yield Cell(f"{name}-w{number}", what_of, "processors", work(4), shown, variant=variant)


def _curve() -> Iterator[Cell]:
    for count in CURVE:
        what = f"requests, {count:,} connection{'s' if count > 1 else ''}"
        yield Cell(f"curve{count}", what, "curve", requests(count), LATENCIES, count)


CELLS = (*_bulk(), *_requests(), *_connects(), *_idle(), *_others(), *_curve())
