"""Who has used the processors, and how much memory: what proc(5) tells."""

import contextlib
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds; the unit of processor time in /proc."""


class Look(NamedTuple):
    """At one moment: seconds of processor time so far."""

    relay: float
    """Of the processes of the relay that is measured."""
    bench: float
    """Of everything that the measurement consists of: that relay, the generator and this program."""
    working: float
    """Of all programs of the machine, and of the kernel for them. Without interrupts: they are in nobody's account."""
    idle: float
    stolen: float
    """By other machines on the same processors."""
    passed: float
    """Seconds of all processors together."""


class Spent(NamedTuple):
    """Between two looks. All but `relay` are parts of the machine."""

    relay: float
    idle: float
    strangers: float
    """What neither the relay nor the bench has used. The least that it can be: the work of the kernel in interrupts
    counts as ours where it is in a program's account, and as nobody's where it is not."""
    stolen: float

    @classmethod
    def between(cls, before: Look, after: Look) -> "Spent":
        relay, bench, working, idle, stolen, passed = (late - early for early, late in zip(before, after))
        whole = max(passed, TICK)
        return cls(relay, idle / whole, max(0.0, working - bench) / whole, stolen / whole)


class Memory(NamedTuple):
    """Bytes, of all processes together."""

    rss: float
    pss: float
    """What several share counts once."""


def look(relay: Iterable[int], others: Iterable[int]) -> Look:
    """Now; with the processes of the relay and of the generator."""
    user, nice, system, idle, iowait, irq, softirq, stolen = _machine()
    own = processor_time(relay)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    here = time.process_time() + children.ru_utime + children.ru_stime
    passed = user + nice + system + idle + iowait + irq + softirq + stolen
    bench = own + processor_time(others) + here
    return Look(own, bench, user + nice + system, idle + iowait, stolen, passed)


def processor_time(pids: Iterable[int]) -> float:
    """Seconds; /proc/PID/stat: utime and stime."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks * TICK


def memory(pids: Iterable[int]) -> Memory:
    """/proc/PID/smaps_rollup"""
    found = {"Rss": 0, "Pss": 0}
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in found:
                    found[name] += int(value.split()[0]) * 1024
    return Memory(found["Rss"], found["Pss"])


def family_of(pid: int) -> list[int]:
    """A process and all that have come from it; /proc/PID/task/TID/children."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def _machine() -> list[float]:
    return [int(word) * TICK for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
