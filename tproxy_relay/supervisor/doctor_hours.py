"""When the doctor of a running relay looks at the host, and when a connection is tried.

Soon after something has changed, at once when connections are missing, now and then in any case; and later and later
where that brings nothing new.

Only the arithmetic; `doctor` has the process. Times are those of time.monotonic().
"""

import math

LOOK, TRY = "look", "try"
"""As in check/background.py."""

SETTLED = 2.0
"""Seconds from the start to the first look."""
FIRST_TRY = 10.0
"""Seconds from the start to the first connection that is tried."""
ROUTINE = 600.0
"""Seconds between two looks when nothing happens."""
SICK_GAP, LONGEST_SICK_GAP = 5.0, 60.0
"""Seconds until it is looked again while something is wrong, half as many more each time."""


class Gap:
    """Seconds from one to the next of the kind at least: twice as many after each that brings nothing new."""

    def __init__(self, least: float, most: float) -> None:
        self.seconds = least
        self._least = least
        self._most = most
        self._called_at = -math.inf

    def called(self, now: float) -> None:
        """There is a reason for one more; the first one after a long time may come at once."""
        if now - self._called_at > self.seconds:
            self.shorten()
        self._called_at = now

    def lengthen(self) -> None:
        """It has brought nothing new."""
        self.seconds = min(2 * self.seconds, self._most)

    def shorten(self) -> None:
        """It has."""
        self.seconds = self._least


class Hours:
    """When what is due."""

    def __init__(self, now: float, self_probe: float) -> None:
        """`self_probe`: seconds between two connections that are tried; 0: none are."""
        self._self_probe = self_probe
        self._settled_at = self._look_at = now + SETTLED
        self._try_at = now + FIRST_TRY if self_probe else math.inf
        self._looked_at = self._tried_at = -math.inf
        self._sick_gap = SICK_GAP
        # A look takes a fifth of a second of a processor, and a connection that is tried another fifth.
        self._look_gap, self._try_gap, self._doubt_gap = Gap(3.0, 120.0), Gap(6.0, 600.0), Gap(6.0, 600.0)

    @property
    def due(self) -> float:
        """When the next thing is due."""
        return min(self._look_at, self._try_at)

    def parts(self, now: float) -> list[str]:
        """What is to be done now."""
        return [LOOK, TRY] if now >= self._try_at else [LOOK]

    def changed(self, now: float) -> None:
        """Others have changed something; or, before it has settled, the relay itself."""
        if now < self._settled_at:
            return
        self._look_gap.called(now)
        self._try_gap.called(now)
        self._look_soon(now)
        self._try_soon(now, self._try_gap.seconds)

    def suspected(self, now: float) -> None:
        """Connections are missing."""
        self._doubt_gap.called(now)
        self._look_soon(now)
        self._try_soon(now, self._doubt_gap.seconds)

    def again(self, now: float) -> None:
        """Something was mended: see whether it helps."""
        self._look_gap.shorten()
        self._try_gap.shorten()
        self._look_soon(now)
        self._try_soon(now, self._try_gap.seconds)

    def _look_soon(self, now: float) -> None:
        self._look_at = min(self._look_at, max(now, self._looked_at + self._look_gap.seconds))

    def _try_soon(self, now: float, gap: float) -> None:
        if self._self_probe and self._tried_at > -math.inf:
            self._try_at = min(self._try_at, max(now, self._tried_at + gap))

    def begun(self, parts: list[str], now: float) -> None:
        """It is being done."""
        self._looked_at, self._look_at = now, math.inf
        if TRY in parts:
            self._tried_at, self._try_at = now, now + self._self_probe

    def done(self, parts: list[str], now: float, *, sick: bool, new: bool) -> None:
        """`sick`: something is wrong. `new`: and that was not known, or what was wrong is not any more."""
        gaps = [self._look_gap, *([self._try_gap, self._doubt_gap] if TRY in parts else [])]
        for gap in gaps:
            gap.shorten() if sick or new else gap.lengthen()
        if not sick:
            self._look_at = min(self._look_at, now + ROUTINE)
            return
        self._sick_gap = SICK_GAP if new else min(1.5 * self._sick_gap, LONGEST_SICK_GAP)
        self._look_at = min(self._look_at, now + self._sick_gap)
        self._try_soon(now + self._sick_gap, self._sick_gap)
