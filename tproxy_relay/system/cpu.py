"""Which processors the workers run on, and how eagerly their threads push others aside.

The threads of one worker share one interpreter lock. Spread over two processors they hand it to and fro between
these, and each hand-over is a wake-up on the other one. On one processor of its own a worker does the same work in a
third of the time. (tests/bench, 256 connections, two workers on two processors: 18,600 requests/s wherever the
scheduler puts the threads, 42,900 when each worker stays on its processor.)

A pump that answers requests, as a thread under SCHED_BATCH (sched(7)), does not interrupt the thread that has just
woken it, which is about to block anyway: 61,200 requests/s. Threads that accept and connect stay as they are, so that
new connections do not wait behind others' work.
"""

import logging
import math
import os

from tproxy_relay.system import cgroup

log = logging.getLogger(__name__)


def allowed() -> list[int]:
    """The numbers of those that this process may run on (sched_getaffinity(2))."""
    return sorted(os.sched_getaffinity(0))


def worth() -> int:
    """How many workers can be busy at the same time: as many as there are processors, or fewer if the cgroup gets less
    time than that (cpu.max of version 2, cpu.cfs_quota_us of version 1; cgroups(7))."""
    return max(1, math.ceil(min(_quota(), len(allowed()))))


def _quota() -> float:
    """Processors' worth of time; infinite without a limit."""
    limits = [*cgroup.texts("cpu", "cpu.max"), *cgroup.texts("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return min(map(_worth_of, limits), default=math.inf)


def _worth_of(limit: str) -> float:
    try:
        quota, period = limit.split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf  # version 1 has -1 for none
    except (ValueError, ZeroDivisionError):
        return math.inf  # `max`


def cpus(affinity: str, workers: int) -> tuple[int, ...]:
    """The processors to keep so many workers on, each on one of them; empty: wherever the scheduler wants.

    `affinity` is `on`, `off`, or `auto`: only if there is a worker for each processor. Fewer of them, say those of many
    small containers, would all choose the same ones.
    """
    mine = allowed()
    return tuple(mine) if affinity == "on" or affinity == "auto" and workers >= len(mine) else ()


class CpuPlacement:
    """Those of one worker. Its methods are about the thread that calls them, and never fail: where a sandbox forbids it
    (EPERM of seccomp(2)), everything runs as it comes."""

    def __init__(self, cpu: int | None) -> None:
        """`cpu` is the number of the processor to stay on; None: any."""
        self._anywhere = os.sched_getaffinity(0)
        self._own_cpu = self._anywhere if cpu is None else {cpu}
        self._movable = cpu is not None
        self._patient = True

    def stay(self) -> None:
        """Stay on the own processor, as will the threads that this one starts."""
        self._move(self._own_cpu)

    def roam(self) -> None:
        """Run anywhere, for now: a stream takes a whole processor, and the own one may have others to serve."""
        self._move(self._anywhere)

    def _move(self, processors: set[int]) -> None:
        if self._movable:
            try:
                os.sched_setaffinity(0, processors)
            except OSError as error:
                self._movable = False
                log.warning("a worker cannot stay on one processor", extra={"error": error.strerror})

    def wait_for_others(self) -> bool:
        """SCHED_BATCH. True if that is so now."""
        self._patient = self._patient and _set_policy(os.SCHED_BATCH)
        return self._patient

    def push_ahead(self) -> None:
        """Give this thread the ordinary policy again (SCHED_OTHER, sched(7)): it interrupts others when it wakes."""
        _set_policy(os.SCHED_OTHER)


def _set_policy(policy: int) -> bool:
    try:
        os.sched_setscheduler(0, policy, os.sched_param(0))
    except OSError:
        return False
    return True
