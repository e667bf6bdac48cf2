"""Connections that the rules have taken, and that did not come to the relay: a suspicion, by two numbers.

The rules count each first packet, also one that is sent again or belongs to no real client; the workers count what they
accept. So a difference is no proof. Times are those of time.monotonic().
"""

from tproxy_relay.guard.messages import Counted

SUSPICIOUS = 3
"""So many more were taken than came. A client that gets no answer sends three SYNs within three seconds."""
CERTAIN, CERTAIN_SECONDS = 10, 10.0
"""So many were taken within at least so many seconds, and none came."""

CREDIT = 10
"""So many may have been accepted since the rules were looked at; those that they have taken are counted next time."""


class Missing:
    """Since when, and how many."""

    def __init__(self) -> None:
        self._counted = Counted()
        self._taken = self._accepted = 0
        """When all was well last."""
        self._accepted_now = self._accepted_then = 0
        """Now, and when the first one was missing."""
        self._since: float | None = None
        self._now = 0.0

    def note(self, counted: Counted, accepted: int, now: float) -> bool:
        """Compare what the rules have taken with what was accepted. True if there is something new, and suspicious.
        The first number comes late, and with it the comparison."""
        self._accepted_now, self._now = accepted, now
        if counted == self._counted:
            return False
        self._counted = counted
        came, went = accepted - self._accepted, self.number
        if went < 0 or 2 * came >= went:  # the rules were loaded anew, or most have come
            self._begin(max(accepted - max(0, came - went), accepted - CREDIT))
            return False
        if self._since is None:
            self._since, self._accepted_then = now, accepted
        return went - came >= SUSPICIOUS

    def disproved(self) -> None:
        """A connection was tried, and came."""
        self._begin(self._accepted_now)

    def _begin(self, accepted: int) -> None:
        self._taken, self._accepted, self._since = self._taken_now, accepted, None

    @property
    def _taken_now(self) -> int:
        return self._counted.inbound + self._counted.outbound

    @property
    def number(self) -> int:
        """How many were taken since the last one came."""
        return self._taken_now - self._taken

    @property
    def certain(self) -> bool:
        """True if so many were taken, for so long, and not one came, that it is more than a suspicion."""
        if self._since is None or self._accepted_now != self._accepted_then:
            return False
        return self.number >= CERTAIN and self._now - self._since >= CERTAIN_SECONDS
