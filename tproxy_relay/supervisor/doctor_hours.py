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
LOOK_GAP, LONGEST_LOOK_GAP = 3.0, 120.0
"""Seconds from one look to the next where something changes on and on: twice as many after each that finds nothing new.
A look takes 0.2 s of a processor."""
TRY_GAP, LONGEST_TRY_GAP = 8.0, 600.0
"""The same for connections that are tried."""
SICK_GAP, LONGEST_SICK_GAP = 5.0, 60.0
"""Seconds until it is looked again while something is wrong, half as many more each time."""


class Hours:
    """When what is due."""

    def __init__(self, now: float, self_probe: float) -> None:
        """`self_probe`: seconds between two connections that are tried; 0: none are."""
        self._self_probe = self_probe
        self._settled_at = self._look_at = now + SETTLED
        self._try_at = now + FIRST_TRY if self_probe else math.inf
        self._looked_at = self._tried_at = self._changed_at = -math.inf
        self._look_gap, self._try_gap, self._sick_gap = LOOK_GAP, TRY_GAP, SICK_GAP

    @property
    def due(self) -> float:
        """When the next thing is due."""
        return min(self._look_at, self._try_at)

    def parts(self, now: float) -> list[str]:
        """What is to be done now; a connection is tried as well if the last one was long enough ago."""
        again = self._tried and now >= self._tried_at + self._try_gap
        return [LOOK, TRY] if now >= self._try_at or again else [LOOK]

    @property
    def _tried(self) -> bool:
        return self._tried_at > -math.inf

    def changed(self, now: float) -> None:
        """Others have changed something; or, before it has settled, the relay itself."""
        if now < self._settled_at:
            return
        if now - self._changed_at > max(self._look_gap, LOOK_GAP):
            self._look_gap = LOOK_GAP
        if now - self._changed_at > self._try_gap:
            self._try_gap = TRY_GAP
        self._changed_at = now
        self._look_at = min(self._look_at, max(now, self._looked_at + self._look_gap))

    def suspected(self, now: float) -> None:
        """Connections are missing: try one, with the usual gap between two."""
        self._look_at = min(self._look_at, max(now, self._looked_at + LOOK_GAP))
        if self._self_probe:
            self._try_at = min(self._try_at, max(now, self._tried_at + self._try_gap))

    def again(self, now: float) -> None:
        """Something was mended: see whether it helps."""
        self._look_at = min(self._look_at, now + LOOK_GAP)
        self._try_gap = TRY_GAP

    def begun(self, parts: list[str], now: float) -> None:
        """It is being done."""
        self._looked_at, self._look_at = now, math.inf
        if TRY in parts:
            self._tried_at, self._try_at = now, math.inf

    def done(self, parts: list[str], now: float, *, sick: bool, new: bool) -> None:
        """`sick`: something is wrong. `new`: and that was not known, or what was wrong is not any more."""
        if sick:
            self._sick_gap = SICK_GAP if new else min(self._sick_gap * 1.5, LONGEST_SICK_GAP)
            self._look_gap, self._try_gap = LOOK_GAP, SICK_GAP
        else:
            self._sick_gap = SICK_GAP
            self._look_gap = LOOK_GAP if new else min(2 * self._look_gap, LONGEST_LOOK_GAP)
            if TRY in parts:
                self._try_gap = TRY_GAP if new else min(2 * self._try_gap, LONGEST_TRY_GAP)
        self._look_at = min(self._look_at, now + (self._sick_gap if sick else ROUTINE))
        if self._tried and self._self_probe:
            self._try_at = min(self._try_at, self._tried_at + self._self_probe)
