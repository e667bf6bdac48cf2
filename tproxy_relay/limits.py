"""How many connections the relay can hold, from what the system lets its processes have."""

import logging
import resource
from typing import NamedTuple

RESERVED_DESCRIPTORS = 40
"""Of a worker, beside its listeners: the channel, the log, shared memory, epoll, wake-ups, and a few for sockets that
are being tried."""

DESCRIPTORS_EACH = 2
"""A connection has two sockets."""

log = logging.getLogger(__name__)


class Limits(NamedTuple):
    """Connections at the same time."""

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


def of_relay(wanted: int | None, descriptors: int, listeners: int, workers: int) -> Limits:
    """As many connections as wanted, or as the descriptors of all workers allow when nothing is wanted; never more
    than they allow."""
    room = max(1, (descriptors - listeners - RESERVED_DESCRIPTORS) // DESCRIPTORS_EACH)
    possible = room * workers
    if wanted is not None and wanted > possible:
        log.warning(
            "max-connections is more than the descriptor limit allows",
            extra={"wanted": wanted, "possible": possible, "descriptors": descriptors, "workers": workers},
        )
    return Limits(possible if wanted is None else min(wanted, possible), room)
