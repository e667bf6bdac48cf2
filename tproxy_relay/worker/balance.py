"""Which worker takes the next client: the balance between those that share the listeners.

A connection that waits in the backlog is served by whoever is there, also when a worker has just died. Left to itself
the kernel would wake the same worker again and again. So a worker that has clearly more connections than another one
leaves new clients to that one: it rests, and polls now and then whether a client has to wait.
tests/bench/accept_sharing.py compares the ways to do it.
"""

import time

from tproxy_relay.ipc import scoreboard
from tproxy_relay.ipc.slot import Slot

REST_PAUSE = 0.1
"""Seconds between two polls of a worker that leaves new clients to others: the longest that a client waits when those
others have just been stopped."""
WATCH_PAUSE = 0.25
"""Seconds between two polls of a worker that takes new clients and has others beside it: the kernel tells only one of
them of a client (EPOLLEXCLUSIVE of epoll_ctl(2)), and that one may have been stopped in the same moment."""
DISTRUST = 2.0
"""Seconds for which a worker leaves no clients to others after it has seen that those do not take them."""


class Balance:
    """One worker's side of it. Decides only; acceptor.py acts. Main thread only."""

    def __init__(self, slot: Slot) -> None:
        self._slot = slot
        self.leaving = False
        """This worker takes its own last clients only, and no other one counts on it."""
        self._accepted = 0
        self._distrust_until = 0.0

    @property
    def doorbell(self) -> int:
        """The descriptor of the scoreboard's doorbell, for an epoll with EPOLLET: whoever rings it has changed
        something that may be this worker's to deal with."""
        return self._slot.scoreboard.doorbell

    def ring(self) -> None:
        """Have the other workers poll their listeners now."""
        self._slot.scoreboard.ring()

    def show(self, state: int) -> None:
        """Let the other workers see what this one does about new clients: RESTING, WATCHING or WAITING of the
        scoreboard. One that leaves is ABSENT whatever it does."""
        self._slot.state = scoreboard.ABSENT if self.leaving else state

    def leave(self) -> None:
        """This worker takes no part in it any more."""
        self.leaving = True
        self.show(scoreboard.ABSENT)

    def goes_on(self) -> bool:
        """True if this worker is to take the next client, too. Rings for workers that rest and have clearly fewer
        connections by now."""
        if self.leaving:
            return True
        if not self.is_needed():
            return False
        if self._slot.fewer_elsewhere(scoreboard.RESTING):
            self._slot.scoreboard.ring()
        return True

    def is_needed(self) -> bool:
        """True if no other worker is to take the next clients."""
        return self._distrust_until > time.monotonic() or not self._slot.fewer_elsewhere(scoreboard.WATCHING)

    def begin_rest(self) -> None:
        """From now on the other workers are expected to accept what comes."""
        self._accepted = self._slot.accepted_everywhere

    def sample(self) -> bool:
        """Count what the whole relay has accepted. True if this worker rests and nobody has accepted anything since the
        last sample: one that has been stopped seems to watch the listeners, too."""
        before, self._accepted = self._accepted, self._slot.accepted_everywhere
        return self._slot.state == scoreboard.RESTING and self._accepted == before

    def distrust(self, now: float) -> None:
        """Leave no clients to others for DISTRUST seconds from `now` (time.monotonic())."""
        self._distrust_until = now + DISTRUST

    @property
    def poll_at(self) -> float | None:
        """When a worker that takes new clients must poll though nothing has woken it (time.monotonic()); None: never,
        because it is alone."""
        return None if self._slot.alone else time.monotonic() + WATCH_PAUSE
