"""What it costs to look in: the same load without and with somebody who watches, in turns.

    python tests/bench/watching.py [--connections 5000] [--rounds 7] [--seconds 3] [--json FILE]

Connections that rest are held all the time, and 256 more ask and answer. Watched means: what a page that is open asks
for every two seconds, what `top` asks for every second, and a scrape every second, each by a process that is not the
relay's. Also how long `tproxy-relay sessions` takes to list all of them. Prints the median of the ratios of each
round; and, because those are noisy, the part of all processors that the relay's processes use more while they are
watched, with connections that rest.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from company import Company  # noqa: E402
from peers import Peer  # noqa: E402
from stage import Stage  # noqa: E402
from usage import processor_time  # noqa: E402
from work import requests  # noqa: E402

ADMIN = 9106
ASKING = 256
PAGE = ("/status", "/sessions?sort=rate&limit=100", "/history")
TOP = ("/status", "/sessions?sort=rate&limit=40")
RESTING = 15.0
"""Seconds without requests."""
WATCHERS = ((2.0, PAGE), (1.0, TOP), (1.0, ("/metrics",)))
"""Seconds between two rounds of questions, and the questions."""

WATCHER = """
import http.client, json, sys, time
pause, port, paths = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
took = []
while True:
    began = time.monotonic()
    for path in paths:
        relay = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        relay.request("GET", path)
        answer = relay.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()
        relay.close()
    print(time.monotonic() - began, flush=True)
    time.sleep(max(0.0, pause - (time.monotonic() - began)))
"""


@contextlib.contextmanager
def watched(peer: Peer) -> Iterator[list[float]]:
    """By all of them. Yields a list that has, afterwards, the seconds that each round of questions took."""
    took: list[float] = []
    watchers = [
        peer.stage.lab.relay.start(
            [sys.executable, "-c", WATCHER, str(pause), str(ADMIN), *paths], stdout=subprocess.PIPE
        )
        for pause, paths in WATCHERS
    ]
    try:
        yield took
        if any(watcher.poll() is not None for watcher in watchers):
            raise RuntimeError("somebody who watched was not answered")
    finally:
        for watcher in watchers:
            watcher.kill()
            said, _ = watcher.communicate()
            took += map(float, said.decode().split())


def listed(peer: Peer) -> tuple[float, int]:
    """Seconds that `tproxy-relay sessions --json` takes, all in all, and how many it shows."""
    command = [sys.executable, "-m", "tproxy_relay", "sessions", "--json", "--config", "/dev/null"]
    ports = sorted({name.rpartition(":")[2] for name in _listeners(peer)})
    began = time.monotonic()
    shown = json.loads(peer.stage.lab.relay.run([*command, "--ports", ",".join(ports)]).stdout)
    return time.monotonic() - began, len(shown["sessions"])


def _listeners(peer: Peer) -> list[str]:
    done = peer.stage.lab.relay.run(["curl", "-s", f"http://127.0.0.1:{ADMIN}/status"])
    return [str(one["name"]) for one in json.loads(done.stdout)["listeners"]]


def used(peer: Peer, seconds: float) -> float:
    """By the relay's processes: the part of all processors."""
    before, began = processor_time(peer.pids()), time.monotonic()
    time.sleep(seconds)
    return (processor_time(peer.pids()) - before) / (time.monotonic() - began) / (os.cpu_count() or 1)


def measured(connections: int, rounds: int, seconds: float) -> dict[str, Any]:
    """All of it."""
    work = requests(ASKING)
    with Stage() as stage, Company(stage, ["relay"], [f"admin = 127.0.0.1:{ADMIN}"]) as company:
        (peer,) = company.peers
        with stage.client("idle", peer.port, connections, 64) as held:
            held.result()
            took, shown = min(listed(peer) for _ in range(3))
            resting = used(peer, RESTING)
            with watched(peer):
                costs = used(peer, RESTING) - resting
            work(peer, 1.0)
            found = [_round(peer, work, seconds, number) for number in range(rounds)]
        ratios = [one["watched"] / one["alone"] for one in found]
        return {
            "connections": connections,
            "listed": shown,
            "listed_seconds": took,
            "resting": resting,
            "costs": costs,
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "answered_p50": statistics.median(one["answered"] for one in found),
            "rounds": found,
            "warnings": company.warnings(),
        }


def _round(peer: Peer, work: Any, seconds: float, number: int) -> dict[str, float]:
    """Alone and watched, another one first each time."""
    found: dict[str, float] = {}
    for what in ("alone", "watched")[:: 1 if number % 2 else -1]:
        if what == "alone":
            found[what] = work(peer, seconds)["rate"]
            continue
        with watched(peer) as took:
            found[what] = work(peer, seconds)["rate"]
        found["answered"] = statistics.median(took)
    return found


def main(arguments: list[str]) -> int:
    """The script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    found = measured(chosen.connections, chosen.rounds, chosen.seconds)
    for one in found["rounds"]:
        ratio = one["watched"] / one["alone"]
        print(f"{one['alone']:9,.0f} requests/s alone, {one['watched']:9,.0f} watched ({ratio:.3f})")
    print(
        f"the relay uses {100 * found['resting']:.1f} % of the processors for connections that rest, and "
        f"{100 * found['costs']:.1f} % more when it is watched\n"
        f"median of the ratios {found['ratio']:.3f}; a round of questions takes {found['answered_p50']:.3f} s; "
        f"`sessions` lists {found['listed']:,} in {found['listed_seconds']:.2f} s"
    )
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
