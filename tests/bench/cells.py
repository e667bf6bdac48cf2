"""What is measured: each cell is one kind of work, done by one relay at a time."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from peers import Peer

Figures = dict[str, float]

_TICKS = 100
"""Of a second, in /proc (proc(5), sysconf(_SC_CLK_TCK))."""


@dataclass(frozen=True)
class Cell:
    """A row of the table."""

    name: str
    what: str
    """For the table."""
    run: Callable[[Peer, float], Figures]
    """With the seconds that it may take; some take as long as they take."""
    group: str
    main: str = "rate"
    """The figure that is in the table first."""
    families: tuple[int, ...] = field(default=(4,))


def bulk(streams: int, direction: str, family: int = 4) -> Callable[[Peer, float], Figures]:
    def run(peer: Peer, seconds: float) -> Figures:
        with busy(peer) as used:
            said = peer.stage.measure("bulk", peer.port, seconds, streams, direction, family=family, seconds=seconds)
        _no_errors(said)
        gigabytes = said["bytes"] / 1e9
        return {"rate": said["bits_per_second"], "cpu_per_gb": used["own"] / gigabytes, "idle": used["idle"]}

    return run


def requests(
    connections: int, response: int = 128, family: int = 4, rate: float = 0
) -> Callable[[Peer, float], Figures]:
    def run(peer: Peer, seconds: float) -> Figures:
        with busy(peer) as used:
            arguments = [seconds, connections, 128, response, *([rate] if rate else [])]
            said = peer.stage.measure("rr", peer.port, *arguments, family=family, seconds=seconds)
        return _of_latencies(said, used)

    return run


def connects(at_once: int, closer: str, family: int = 4) -> Callable[[Peer, float], Figures]:
    def run(peer: Peer, seconds: float) -> Figures:
        with busy(peer) as used:
            said = peer.stage.measure("conn", peer.port, seconds, at_once, closer, family=family, seconds=seconds)
        return _of_latencies(said, used)

    return run


def connects_beside_hogs(peer: Peer, seconds: float) -> Figures:
    """Two programs that only compute, one for each of two processors."""
    command = [sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            hog = stack.enter_context(peer.stage.lab.relay.start(command))
            stack.callback(hog.kill)
        return connects(1, "server")(peer, seconds)


def idle(connections: int) -> Callable[[Peer, float], Figures]:
    """Opened, held, and at last asked once more."""

    def run(peer: Peer, _: float) -> Figures:
        empty = resident(peer)
        with peer.stage.start("idle", peer.port, connections, 64) as load:
            try:
                opened = _next(load)
                held = resident(peer)
                asked = _ask(load)
            finally:
                load.kill()
        _no_errors(opened)
        return {
            "open_seconds": opened["seconds"],
            "rss_per_connection": (held - empty) / connections,
            "base_rss": empty,
            "round_p99": asked["p99"],
            "round_seconds": asked["seconds"],
            "unanswered": asked["errors"],
        }

    return run


def idle_after_bulk(peer: Peer, seconds: float) -> Figures:
    """The memory of 16 streams that have been busy, and are idle, against that of before."""
    with peer.stage.start("idle", peer.port, 200, 64) as load:
        try:
            _no_errors(_next(load))
            before = resident(peer)
            bulk(16, "both")(peer, seconds)
            _ask(load)
            settled = _settled(peer)
        finally:
            load.kill()
    return {"rss_ratio": settled / before, "rss_before": before, "rss_after": settled}


def mixed(peer: Peer, seconds: float) -> Figures:
    """200 connections with 2,000 requests a second in all, beside two streams as fast as they go."""
    with peer.stage.start("bulk", peer.port, seconds + 1.5, 2, "up") as load:
        try:
            figures = requests(200, rate=2000)(peer, seconds)
            said = _next(load)
        finally:
            load.kill()
    _no_errors(said)
    return {**figures, "bulk_rate": said["bits_per_second"]}


CELLS = tuple(
    [
        Cell(
            f"bulk{streams}-{direction}",
            f"{streams} stream{'s' if streams > 1 else ''} {direction}",
            bulk(streams, direction),
            "bulk",
        )
        for streams in (1, 4, 16)
        for direction in ("up", "down", "both")
    ]
    + [
        Cell(f"rr{count}", f"requests, {count} connection{'s' if count > 1 else ''}", requests(count), "rr")
        for count in (1, 32, 256, 2048)
    ]
    + [
        Cell("rr32-16k", "requests, 32 connections, 16 KiB back", requests(32, 16384), "rr"),
        Cell("conn1", "new connections, one at a time", connects(1, "server"), "conn"),
        Cell("conn32", "new connections, 32 at once", connects(32, "server"), "conn"),
        Cell("conn256", "new connections, 256 at once", connects(256, "server"), "conn"),
        Cell("conn32-client", "the same, the client closes first", connects(32, "client"), "conn"),
        Cell("conn32-reset", "the same, the client resets", connects(32, "reset"), "conn"),
        Cell("conn1-hogs", "one at a time, beside 2 programs that compute", connects_beside_hogs, "conn"),
        Cell("mixed", "2,000 requests/s on 200 connections beside 2 streams", mixed, "mixed", "p99"),
        Cell("idle1000", "1,000 idle connections", idle(1000), "idle", "rss_per_connection"),
        Cell("idle5000", "5,000 idle connections", idle(5000), "idle", "rss_per_connection"),
        Cell("hold9000", "9,000 connections, each asked once", idle(9000), "idle", "round_p99"),
        Cell("after-bulk", "memory after 16 busy streams", idle_after_bulk, "idle", "rss_ratio"),
        Cell("bulk1-up-v6", "1 stream up, IPv6", bulk(1, "up", 6), "v6"),
        Cell("rr32-v6", "requests, 32 connections, IPv6", requests(32, family=6), "v6"),
        Cell("conn32-v6", "new connections, 32 at once, IPv6", connects(32, "server", 6), "v6"),
    ]
    + [
        Cell(f"curve{count}", f"requests, {count} connections", requests(count), "curve")
        for count in (1, 8, 32, 128, 512, 2048, 5000, 9000)
    ]
)


@contextlib.contextmanager
def busy(peer: Peer) -> Iterator[Figures]:
    """Afterwards: seconds of processor time that the relay has used, and the part of the machine that had nothing to
    do."""
    used: Figures = {}
    own, all_of_it = _own(peer), _machine()
    yield used
    machine = [after - before for before, after in zip(all_of_it, _machine())]
    used["own"] = (_own(peer) - own) / _TICKS
    used["idle"] = sum(machine[3:5]) / max(1, sum(machine))


def _own(peer: Peer) -> int:
    """proc(5), /proc/PID/stat: utime and stime."""
    total = 0
    for pid in peer.pids():
        with contextlib.suppress(OSError):
            total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return total


def _machine() -> list[int]:
    return list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))


def resident(peer: Peer) -> float:
    """Bytes of memory of all its processes (proc(5), smaps_rollup: Pss, so that what they share counts once)."""
    total = 0
    for pid in peer.pids():
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def _settled(peer: Peer) -> float:
    """The memory once it falls no more: some of it is given back after seconds of silence."""
    best = resident(peer)
    for _ in range(8):
        subprocess.run(["sleep", "1"], check=True)
        best = min(best, resident(peer))
    return best


def _of_latencies(said: Figures, used: Figures) -> Figures:
    _no_errors(said)
    if not said["count"]:
        raise RuntimeError("nothing was answered")
    figures = {name: said[name] for name in ("p50", "p90", "p99", "p999", "max")}
    return {
        "rate": said["count"] / said["seconds"],
        "cpu_per_item": used["own"] / said["count"],
        "idle": used["idle"],
        **figures,
    }


def _no_errors(said: Figures) -> None:
    if said["errors"]:
        raise RuntimeError(f"{said['errors']} errors")


def _next(load: "subprocess.Popen[bytes]") -> Figures:
    assert load.stdout is not None
    line = load.stdout.readline()
    if not line:
        raise RuntimeError("the generator has failed")
    found: Figures = json.loads(line)
    return found


def _ask(load: "subprocess.Popen[bytes]") -> Figures:
    assert load.stdin is not None
    load.stdin.write(b"\n")
    load.stdin.flush()
    return _next(load)
