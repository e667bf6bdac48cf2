"""Connections that the rules have taken, and that did not come to the relay: a suspicion, by two numbers.

The rules count each first packet, also one that is sent again or belongs to no real client; the workers count what they
accept. So a difference is no proof. Times are those of time.monotonic().
"""

from tproxy_relay.guard.messages import Counted

SUSPICIOUS = 3
"""So many more were taken than came. A client that gets no answer sends three SYNs within three seconds."""
CERTAIN, CERTAIN_SECONDS = 10, 10.0
"""So many were taken within at least so many seconds, and none came."""


class Missing:
    """Since when, and how many."""

    def __init__(self) -> None:
        self._counted = Counted()
        self._taken = self._accepted = 0
        """When all was well last."""
        self._taken_now = self._accepted_now = 0
        self._since = self._now = 0.0

    def note(self, counted: Counted, accepted: int, now: float) -> bool:
        """Compare what the rules have taken with what was accepted. True if there is something new, and suspicious."""
        taken = counted.inbound + counted.outbound
        fresh, self._counted = counted != self._counted, counted
        self._taken_now, self._accepted_now, self._now = taken, accepted, now
        came, went = accepted - self._accepted, taken - self._taken
        if went < 0 or 2 * came >= went:  # the rules were loaded anew, or most have come
            self._begin()
            return False
        return fresh and went - came >= SUSPICIOUS

    def disproved(self) -> None:
        """A connection was tried, and came."""
        self._begin()

    def _begin(self) -> None:
        self._taken, self._accepted, self._since = self._taken_now, self._accepted_now, self._now

    @property
    def number(self) -> int:
        """How many were taken since the last one came."""
        return self._taken_now - self._taken

    @property
    def certain(self) -> bool:
        """True if so many were taken, for so long, and not one came, that it is more than a suspicion."""
        none_came = self._accepted_now == self._accepted
        return none_came and self.number >= CERTAIN and self._now - self._since >= CERTAIN_SECONDS
