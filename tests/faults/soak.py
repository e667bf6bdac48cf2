"""Connections at a constant rate for a long time, some of them cut, and whether anything grows.

    python tests/faults/soak.py [--minutes 30] [--rate 100] [--workers 2] [--seed N]

A line for each look at the relay, then a summary; ends with 1 if a promise does not hold. Every few seconds the relay
counts its connections under load, and then no new ones come for a moment, until the last one is over: what the
processes hold then is what they keep.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from schedules import AT_ONCE, FIRST_PORT, OPTIONS, Run
from scripted_end import Step

from tproxy_relay.lab import Lab, Line, RelayProcess

MOST = 10_000_000
"""Bytes one way. Sizes have a heavy tail (Pareto): half of them are below 1,100 bytes."""
EACH_CUT = 0.05
"""Of the connections: reset by the client, by the server, half-closed."""
MIB = 1024
"""In KiB."""
NOISE = 3.0
"""MiB by which a short run may grow: malloc's arenas grow by up to 1.4 MiB in two minutes (measured) where they shrink
again in the next ten. A connection that left 256 bytes behind would show in three minutes."""
INTERVAL = 5.0
"""Seconds between two looks."""
WARM_UP, WARM_UP_RATE, WARM_UP_AT_RATE = 1 / 3, 600.0, 60.0
"""Of the time, five minutes at most; connections a second for the first so many seconds of it. The heaps of the
relay's threads reach their size after some 30,000 connections (measured), and stay there."""
REST = 0.1
"""Seconds that a server takes to answer, on the average."""
TRIES = 5
"""A count is read word by word while workers write it, so it may be one off; one that was lost stays away."""


@dataclass(frozen=True)
class Look:
    """What the relay's processes hold while it has no connection, all added up; `seconds` after the start."""

    seconds: float
    descriptors: int
    threads: int
    rss_kib: int
    accepted: int
    closed: int
    active: int
    """These three under load, just before."""

    def __str__(self) -> str:
        counts = f"{self.accepted} accepted = {self.closed} closed + {self.active} active"
        return (
            f"{self.seconds:7.1f} s: {counts}; at rest {self.descriptors} descriptors, {self.threads} threads, "
            f"{self.rss_kib / MIB:.2f} MiB"
        )


class ForgetfulRelay(RelayProcess):
    """Hands the record of each connection on and does not keep it: there would be hundreds of thousands."""

    hear: Callable[[Line], None] = staticmethod(lambda record: None)

    def _take(self, text: str) -> None:
        line = json.loads(text) if '"connection ' in text else {}
        if line.get("message") == "connection closed" and line["levelname"] == "INFO":
            self.hear(line)
        elif line.get("message") != "connection live":
            super()._take(text)


def plans(dice: random.Random) -> tuple[list[Step], list[Step]]:
    """A request and its answer; or one side cuts it, or the client is done before it is answered."""
    up, down = size(dice), size(dice)
    client: list[Step] = [("send", up), ("await", down), ("finish", 0)]
    rest: Step = ("rest", min(2.0, dice.expovariate(1 / REST)))
    server: list[Step] = [("await", up), rest, ("send", down), ("await", MOST * 2), ("finish", 0)]
    chance = dice.random()
    if chance < EACH_CUT:
        client = [("send", up), ("await", int(down * dice.random())), ("reset", 0)]
    elif chance < 2 * EACH_CUT:
        server = [("await", int(up * dice.random())), rest, ("send", int(down * dice.random())), ("reset", 0)]
    elif chance < 3 * EACH_CUT:
        client = [("send", up), ("finish", 0)]
        server = [("await", MOST * 2), rest, ("send", down), ("finish", 0)]
    return client, server


def size(dice: random.Random) -> int:
    """Bytes. Every tenth is 0."""
    return 0 if dice.random() < 0.1 else min(MOST, int(500 * dice.paretovariate(0.9)))


class Soak:
    """Time, rate, and what was seen."""

    def __init__(self, relay: RelayProcess, run: Run, minutes: float, rate: float) -> None:
        self.looks: list[Look] = []
        self.begun = 0
        self._relay, self._run = relay, run
        self._seconds, self._rate = minutes * 60, rate
        self._warm = min(300.0, self._seconds * WARM_UP)
        self._pids = [relay.pid, *relay.workers]
        self._started = self._added = time.monotonic()
        self._owed = 0.0

    def soak(self, report: Callable[[str], None]) -> None:
        """All of it. AssertionError when a connection is not as it must be."""
        next_look = INTERVAL
        while (now := time.monotonic() - self._started) < self._seconds:
            self._keep_up()
            self._run.turn(0.005)
            if now >= next_look:
                self.looks.append(self._look(now))
                report(str(self.looks[-1]))
                next_look = time.monotonic() - self._started + INTERVAL

    def _keep_up(self) -> None:
        """Connections that are due. What was held up by a look, or had no port free, comes a little later."""
        now = time.monotonic()
        fast = now - self._started < min(self._warm, WARM_UP_AT_RATE)
        rate = max(self._rate, WARM_UP_RATE) if fast else self._rate
        self._owed = min(self._owed + (now - self._added) * rate, AT_ONCE)
        self._added = now
        while self._owed >= 1 and self._run.free:
            self._run.begin(self.begun)
            self.begun += 1
            self._owed -= 1

    def _look(self, now: float) -> Look:
        counts = self._counts()
        for _ in range(TRIES):
            if counts["accepted"] == sum(counts["closed"].values()) + counts["live"]:
                break
            counts = self._counts()
        while self._run.live:
            self._run.turn(0.005)
        held = [(len(os.listdir(f"/proc/{pid}/fd")), *_status(pid)) for pid in self._pids]
        descriptors, threads, rss = (sum(column) for column in zip(*held))
        closed = sum(counts["closed"].values())
        return Look(now, descriptors, threads, rss, counts["accepted"], closed, counts["live"])

    def _counts(self) -> Line:
        """The relay's own, while connections come and go."""
        before = self._told()
        self._relay.signal(signal.SIGUSR1)
        deadline = time.monotonic() + 20
        while len(told := self._told()) == len(before):
            assert time.monotonic() < deadline, "the relay does not tell its counts"
            self._keep_up()
            self._run.turn(0.001)
        return told[-1]

    def _told(self) -> list[Line]:
        return [line for line in self._relay.lines() if line["message"] == "connections"]

    def faults(self) -> list[str]:
        """What must not be."""
        found = [f"lost count: {look}" for look in self.looks if look.accepted != look.closed + look.active]
        minutes, descriptors, mib = self._grown()
        if abs(descriptors) >= 1:
            found.append(f"{descriptors:+.1f} descriptors in {minutes:.1f} minutes")
        if mib >= max(NOISE, minutes / 10):  # 1 MiB in 10 minutes
            found.append(f"{mib:+.2f} MiB in {minutes:.1f} minutes")
        lines = self._relay.lines()
        found += [f"in the log: {line}" for line in lines if line["levelname"] not in ("DEBUG", "INFO")]
        stopped = [line for line in lines if line["message"] == "stopped"]
        if not stopped or (stopped[0]["accepted"], stopped[0]["live"]) != (self.begun, 0):
            found.append(f"{self.begun} connections, and in the end the relay says {stopped}")
        return found

    def summary(self) -> str:
        """In two lines."""
        minutes, descriptors, mib = self._grown()
        most = max(look.active for look in self.looks)
        return (
            f"{self.begun} connections, {self._run.bytes / 1e9:.2f} GB, up to {most} at once when looked at, "
            f"{len(self.looks)} looks, {dict(self._run.outcomes)}\n"
            f"in {minutes:.1f} minutes after a warm-up of {self._warm:.0f} s: {descriptors:+.2f} descriptors, "
            f"{mib:+.3f} MiB ({10 * mib / minutes:+.3f} in 10 minutes)"
        )

    def _grown(self) -> tuple[float, float, float]:
        """Minutes after the warm-up, and by how many descriptors and MiB the relay grew in them."""
        late = [look for look in self.looks if look.seconds >= self._warm]
        times = [look.seconds for look in late]
        seconds = times[-1] - times[0]
        descriptors = slope(times, [look.descriptors for look in late]) * seconds
        return seconds / 60, descriptors, slope(times, [look.rss_kib for look in late]) * seconds / MIB


def _status(pid: int) -> tuple[int, int]:
    """Threads, and KiB in memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["Threads"]), int(fields["VmRSS"].split()[0])


def slope(times: list[float], values: list[int]) -> float:
    """By least squares, in a second."""
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    above = sum((when - mean_time) * (value - mean) for when, value in zip(times, values))
    return above / sum((when - mean_time) ** 2 for when in times)


def run_soak(
    lab: Lab, minutes: float, rate: float, seed: int, *, workers: int = 2, report: Callable[[str], None]
) -> list[str]:
    """A whole run; what must not be, of which there should be nothing."""
    lab.intercept((f"{FIRST_PORT}-{FIRST_PORT + AT_ONCE - 1}",))
    options = (*OPTIONS[2:], "--workers", str(workers))
    with ForgetfulRelay(lab.relay, options) as relay, Run(lab, relay, seed, plans) as run:
        lab.relays.append(relay)
        relay.hear = run.hear
        soak = Soak(relay, run, minutes, rate)
        soak.soak(report)
        while run.live:
            run.turn()
        relay.stop()
        report(soak.summary())
        return soak.faults()


def main(arguments: list[str]) -> int:
    """The script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=100, help="connections a second")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    chosen = parser.parse_args(arguments)
    say = lambda text: print(text, flush=True)  # noqa: E731
    say(f"seed {chosen.seed}")
    with Lab() as lab:
        faults = run_soak(lab, chosen.minutes, chosen.rate, chosen.seed, workers=chosen.workers, report=say)
    say("\n".join(["FAILED", *faults]) if faults else "nothing grew, nothing was lost")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
