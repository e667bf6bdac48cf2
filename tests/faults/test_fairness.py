"""Streams in full flow, small messages among them, and many at once: nobody waits for somebody else's bulk.

Measured with the load generator of tests/bench, which has a process and a clock of its own.
"""

from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from company import Company
from peers import Peer
from rows import Seen
from stage import Stage
from work import Work, beside_bulk, bulk, requests

from tproxy_relay.lab import LabError

SECONDS, TRIES = 2.0, 4
"""Of a measurement; the best of some counts, for the machine has other things to do."""

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture(scope="module")
def peers(require_or_skip: Callable[[str], NoReturn]) -> Iterator[dict[str, Peer]]:
    try:
        stage = Stage()
    except LabError as error:
        require_or_skip(str(error))
    with stage, Company(stage, ["relay", "c", "direct"]) as company:
        yield {peer.name: peer for peer in company.peers}


def best_p99(peer: Peer, work: Work, enough: float) -> float:
    """Seconds, of the best try; all of them went through the relay."""
    found = []
    for _ in range(TRIES):
        with peer.witnessed():
            found.append(work(peer, SECONDS)["p99"])
        if found[-1] <= enough:
            break
    return min(found)


@pytest.mark.row("L4", "a stream, down and up", "at least 70 % of a C relay of the same shape, in the same run")
@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_stream(peers: dict[str, Peer], direction: str, seen: Seen) -> None:
    work, found = bulk(1, direction), []
    for _ in range(TRIES):
        rates = {}
        for name in ("c", "relay"):
            with peers[name].witnessed():
                rates[name] = work(peers[name], SECONDS)["throughput"]
        found.append(rates["relay"] / rates["c"])
        if found[-1] >= 0.7:
            break
    assert max(found) >= 0.7, found
    seen(f"{direction}: {100 * max(found):.0f} %")


@pytest.mark.row("L9", "100 clients send something small every 10 ms", "p99 at most 10 ms more than directly")
def test_many_small_messages(peers: dict[str, Peer], seen: Seen) -> None:
    work = requests(100, 1, rate=10_000)
    direct = best_p99(peers["direct"], work, 0.001)
    relayed = best_p99(peers["relay"], work, direct + 0.01)
    assert relayed - direct <= 0.01
    seen(f"{(relayed - direct) * 1000:.1f} ms more")


@pytest.mark.row("L12", "2 streams in full flow, and 200 clients that ask 2,000 times a second", "p99 at most 100 ms")
def test_requests_beside_streams(peers: dict[str, Peer], seen: Seen) -> None:
    p99 = best_p99(peers["relay"], beside_bulk(2, requests(200, rate=2000)), 0.1)
    assert p99 <= 0.1
    seen(f"{p99 * 1000:.0f} ms")
