"""Connections that the rules have taken, and that did not come to the relay: a suspicion, by two numbers.

The rules count each first packet, also one that is sent again or belongs to no real client; the workers count what they
accept. So a difference is no proof. A handshake that came here and was not finished, as a scanner's, leaves a trace in
the kernel's numbers, though; what others have taken on its way leaves none. Times are those of time.monotonic().
"""

from collections.abc import Callable

from tproxy_relay.guard.messages import Counted

SUSPICIOUS = 3
"""So many more were taken than came. A client that gets no answer sends three SYNs within three seconds."""
CERTAIN, CERTAIN_SECONDS = 10, 10.0
"""So many were taken within at least so many seconds, and none came."""

LASTING = 300.0
"""Seconds for which missing ones without a trace count, when no more follow, and a connection that is tried comes."""

CREDIT = 10
"""So many may have been accepted since the rules were looked at; those that they have taken are counted next time."""


class Missing:
    """Since when, and how many."""

    def __init__(self, unfinished: Callable[[], int | None]) -> None:
        """`unfinished` is net.proc_net's."""
        self._unfinished = unfinished
        self._traces = unfinished()
        """When all was well last."""
        self._counted: Counted | None = Counted()
        self._taken = self._accepted = 0
        """When all was well last."""
        self._accepted_now = self._accepted_then = 0
        """Now, and when the first one was missing."""
        self._tried = 0
        """Our own ones, which are in both numbers."""
        self._since: float | None = None
        self._now = self._grew_at = 0.0

    def note(self, counted: Counted | None, accepted: int, now: float) -> bool:
        """Compare what the rules have taken with what was accepted. True if there is something new, and suspicious.
        The first number comes late, and with it the comparison. `counted` is None until the guard has said what rules
        have taken that were another relay's: with that it begins."""
        accepted -= self._tried
        self._accepted_now, self._now = accepted, now
        if counted == self._counted:
            return False
        is_first = self._counted is None or counted is None
        self._counted, self._grew_at = counted, now
        if is_first:
            self._begin(accepted)
            return False
        came, went = accepted - self._accepted, self.number
        if went < 0 or 2 * came >= went:  # the rules were loaded anew, or most have come
            self._begin(max(accepted - max(0, came - went), accepted - CREDIT))
            return False
        if self._since is None:
            self._since, self._accepted_then = now, accepted
        return went - came >= SUSPICIOUS

    def tried(self, number: int, now: float, *, changed: bool) -> None:
        """So many connections were tried, and came. That shows what others do by their interface only if they do it to
        all: those that are missing are forgotten if they have left traces, or if the host has `changed` meanwhile."""
        if changed or self.traced is not False or self.number < SUSPICIOUS or now - self._grew_at > LASTING:
            self._begin(self._accepted_now)
        else:
            self._tried += number

    def _begin(self, accepted: int) -> None:
        self._taken, self._accepted, self._since = self._taken_now, accepted, None
        self._traces = self._unfinished()

    @property
    def _taken_now(self) -> int:
        counted = self._counted or Counted()
        return counted.inbound + counted.outbound - self._tried

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

    @property
    def traced(self) -> bool | None:
        """True if half as many traces were left as are missing, by handshakes that came here and were not finished.
        None where the kernel does not tell."""
        traces = self._unfinished()
        if self._traces is None or traces is None:
            return None
        return 2 * (traces - self._traces) >= self.number
