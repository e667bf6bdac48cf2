"""The kinds of work: each returns a function that has one relay do it, and tells its figures.

Figures are seconds, bytes, bits/s and 1/s. `cpu_per_...` is processor time of the relay's own processes.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import usage
from generator import Arrivals, Client
from peers import Peer, Unable
from usage import Spent

from tproxy_relay.lab import LabError

Figures = dict[str, float]
Work = Callable[[Peer, float], Figures]
"""With the seconds that it may take; some take as long as they take."""

SETTLE = 1.0
"""Seconds of silence before memory is looked at."""
CALM, CALM_AT_LAST = 4.0, 12.0
"""Memory falls no more when it has not fallen for so long; relays may give it back after some seconds only."""
PERCENTILES = ("p50", "p90", "p99", "p999", "max")
LARGE = 16 << 20
"""Bytes of a response that is bulk to everybody."""


class Measured(NamedTuple):
    """Between the generator's `go` and its `end`."""

    said: dict[str, Any]
    spent: Spent
    before: Arrivals
    after: Arrivals

    @property
    def figures(self) -> Figures:
        """What there is in all kinds of work."""
        return {"idle": self.spent.idle, "strangers": self.spent.strangers, "stolen": self.spent.stolen}

    @property
    def throughput(self) -> float:
        """Bits/s that arrived, at the server or at the client."""
        up = (self.after.received - self.before.received) / (self.after.time - self.before.time)
        down: float = self.said["down"] / self.said["seconds"]
        return 8 * (up + down)


def bulk(streams: int, direction: str, family: int = 4) -> Work:
    """`up` is from client to server; `both` is so many each way."""

    def work(peer: Peer, seconds: float) -> Figures:
        with peer.stage.client("bulk", peer.port, seconds, streams, direction, family=family) as client:
            measured = _measured(peer, client)
        throughput = measured.throughput
        gigabytes = throughput * measured.said["seconds"] / 8e9
        return {"throughput": throughput, "cpu_per_gb": measured.spent.relay / gigabytes, **measured.figures}

    return work


def requests(connections: int, response: int = 128, *, rate: float = 0, family: int = 4) -> Work:
    """On connections that stay; 128 bytes there. With a rate, so many a second whatever the relay does."""

    def work(peer: Peer, seconds: float) -> Figures:
        sizes = (128, response, *([rate] if rate else []))
        with peer.stage.client("requests", peer.port, seconds, connections, *sizes, family=family) as client:
            return _with_latencies(_measured(peer, client))

    return work


def connects(at_once: int, closer: str, family: int = 4) -> Work:
    """Connections that come, exchange 128 bytes, and go."""

    def work(peer: Peer, seconds: float) -> Figures:
        with peer.stage.client("connects", peer.port, seconds, at_once, closer, family=family) as client:
            return _with_latencies(_measured(peer, client))

    return work


def beside_hogs(count: int, work: Work) -> Work:
    """While so many programs only compute."""

    def beside(peer: Peer, seconds: float) -> Figures:
        with contextlib.ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(peer.stage.beside(peer.stage.lab.relay, [sys.executable, "-c", "while 1: pass"]))
            return work(peer, seconds)

    return beside


def beside_bulk(streams: int, work: Work) -> Work:
    """While so many streams go up."""

    def beside(peer: Peer, seconds: float) -> Figures:
        with peer.stage.client("bulk", peer.port, seconds + 30, streams, "up") as client:
            client.expect("go")
            before = peer.stage.server.arrivals(peer.port)
            figures = work(peer, seconds)
            after = peer.stage.server.arrivals(peer.port)
            client.stop()
            client.expect("end")
            _check(client.result())
        # What a request costs cannot be told from what the streams do.
        figures.pop("cpu_per_item", None)
        received = after.received - before.received
        return {**figures, "beside_throughput": 8 * received / (after.time - before.time)}

    return beside


def idle(connections: int) -> Work:
    """Opened, held, and then each asked once. For a relay that has done nothing before."""

    def work(peer: Peer, _: float) -> Figures:
        empty = usage.memory(peer.pids())
        with peer.stage.client("idle", peer.port, connections, 64) as client:
            opened = _check(client.result())
            time.sleep(SETTLE)
            held = usage.memory(peer.pids())
            asked = client.ask(128)
        figures = {
            "open_seconds": opened["seconds"],
            "open_p99": opened["p99"],
            "round_seconds": asked["seconds"],
            "round_p99": asked["p99"],
            "unanswered": asked["errors"],
        }
        if empty.rss:
            figures["rss_per_connection"] = (held.rss - empty.rss) / connections
            figures["pss_per_connection"] = (held.pss - empty.pss) / connections
            figures["base_rss"] = empty.rss
        return figures

    return work


def idle_after_bulk(connections: int, at_once: int) -> Work:
    """Connections that have been streams for a while, and then do nothing: memory against what it was before."""

    def work(peer: Peer, _: float) -> Figures:
        if not peer.pids():
            raise Unable("no processes")
        with peer.stage.client("idle", peer.port, connections, at_once) as client:
            _check(client.result())
            time.sleep(SETTLE)
            before = usage.memory(peer.pids()).rss
            _check(client.ask(LARGE))
            after = min(_falling(peer))
        return {"rss_ratio": after / before, "rss_before": before, "rss_after": after}

    return work


def _falling(peer: Peer) -> Iterator[float]:
    """Memory, until it falls no more."""
    began = fell = time.monotonic()
    least = float("inf")
    while time.monotonic() < min(fell + CALM, began + CALM_AT_LAST):
        rss = usage.memory(peer.pids()).rss
        if rss < 0.995 * least:
            least, fell = rss, time.monotonic()
        yield rss
        time.sleep(0.25)


def _measured(peer: Peer, client: Client) -> Measured:
    stage, pids = peer.stage, peer.pids()
    client.expect("go")
    early, before = stage.look(pids), stage.server.arrivals(peer.port)
    client.expect("end")
    late, after = stage.look(pids), stage.server.arrivals(peer.port)
    return Measured(_check(client.result()), Spent.between(early, late), before, after)


def _check(said: dict[str, Any]) -> dict[str, Any]:
    if said["errors"]:
        raise LabError(f"{said['errors']} errors; the first: {said['first_error']}")
    return said


def _with_latencies(measured: Measured) -> Figures:
    said = measured.said
    if not said["answered"]:
        raise LabError("nothing was answered")
    return {
        "rate": said["answered"] / said["seconds"],
        **{name: said[name] for name in PERCENTILES},
        "cpu_per_item": measured.spent.relay / said["answered"],
        **measured.figures,
    }
