"""How many connections the relay can hold, from what the system lets its processes have."""

import logging
import os
import resource
from typing import NamedTuple

from tproxy_relay.system import cgroup

RESERVED_DESCRIPTORS = 40
"""Of a worker, beside its listeners: the channel, the log, shared memory, epoll, wake-ups, and a few for sockets that
are being tried."""

DESCRIPTORS_EACH = 2
"""A connection has two sockets."""

MEMORY_EACH = 128 * 1024
"""Bytes of a connection at rest: 45 KiB of the worker, 32 of the kernel for the stacks of two threads, and the sockets
and tasks. One that is in full flow takes up to 1 MiB more, and buffers of its sockets as the kernel gives them.
(Measured with 6,000 connections: MemAvailable less by 153 KiB each, the sockets of clients and servers on the same host
included.)"""
MEMORY_SHARE = 0.75
"""Of all memory, for connections: the rest is for their data, and for others."""

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """How many connections there may be at the same time."""

    most: int
    """In the whole relay."""
    room: int
    """In one worker, for which its descriptors suffice."""


def raise_descriptor_limit() -> int:
    """Lift the soft RLIMIT_NOFILE to the hard one (getrlimit(2)), for the workers too, and return what is in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return soft  # fs.nr_open was lowered below the hard limit
    return hard


def usable_memory() -> int:
    """Bytes for connections: of this host (sysinfo(2)), or of the control group if it has fewer (cgroups(7))."""
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in ("memory.max", "memory.limit_in_bytes"):  # of version 2, and of version 1
        bound = cgroup.least("memory", file)
        if bound is not None:
            bounds.append(bound)
    return int(MEMORY_SHARE * min(bounds))


def of_relay(wanted: int | None, descriptors: int, listeners: int, workers: int, memory: int) -> Limits:
    """As many connections as wanted, never more than the descriptors of all workers allow; when nothing is wanted, as
    many as those and the memory allow."""
    room = max(1, (descriptors - listeners - RESERVED_DESCRIPTORS) // DESCRIPTORS_EACH)
    possible = room * workers
    in_memory = max(1, memory // MEMORY_EACH)
    if wanted is not None and wanted > possible:
        log.warning(
            "max-connections is more than the descriptor limit allows",
            extra={"wanted": wanted, "possible": possible, "descriptors": descriptors, "workers": workers},
        )
    if wanted is not None and min(wanted, possible) > in_memory:
        log.warning(
            "max-connections is more than the memory is enough for",
            extra={"wanted": wanted, "enough_for": in_memory, "bytes": memory, "bytes_each": MEMORY_EACH},
        )
    return Limits(min(possible, in_memory) if wanted is None else min(wanted, possible), room)
