"""How many connections this process can hold, from what the system lets it have."""

import logging
import os
import resource

RESERVED_DESCRIPTORS = 24
"""Beside those open at start: log file, epoll, wake-ups, and a few for sockets that are being tried."""

DESCRIPTORS_EACH = 2
"""A connection has two sockets."""

log = logging.getLogger(__name__)


def raise_descriptor_limit() -> int:
    """Lift the soft RLIMIT_NOFILE to the hard one (getrlimit(2)) and return what is in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        return soft  # fs.nr_open was lowered below the hard limit
    return hard


def max_connections(wanted: int | None, descriptors: int) -> int:
    """As many as wanted, or as the descriptors allow when nothing is wanted; never more than they allow."""
    open_now = len(os.listdir("/proc/self/fd"))
    possible = max(1, (descriptors - open_now - RESERVED_DESCRIPTORS) // DESCRIPTORS_EACH)
    if wanted is not None and wanted > possible:
        log.warning(
            "max-connections is more than the descriptor limit allows",
            extra={"wanted": wanted, "possible": possible, "descriptors": descriptors},
        )
    return possible if wanted is None else min(wanted, possible)
