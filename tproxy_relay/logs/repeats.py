"""What goes on being so is logged once, not each time that it is found to be so: a log is for people.

Nothing here logs anything, or is for several threads at a time.
"""

import time

INTERVAL = 60.0
"""Seconds for which a line is not repeated."""


class Seldom:
    """Lines that may come again and again, each at most once in INTERVAL seconds."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, ...], float] = {}

    def is_due(self, *line: str) -> bool:
        """True if what these words tell is to be logged now: it was not within the last INTERVAL seconds."""
        now = time.monotonic()
        self._said = {one: at for one, at in self._said.items() if now - at < INTERVAL}
        if line in self._said:
            return False
        self._said[line] = now
        return True


class Complaint:
    """One thing that can be wrong for a while: to be logged when it begins, and when it ends."""

    def __init__(self) -> None:
        self._lines = Seldom()
        self._why: str | None = None
        self._logged = False

    def __bool__(self) -> bool:
        """True while it is wrong."""
        return self._why is not None

    def begins(self, why: str) -> bool:
        """It is wrong, for this reason. True if that is to be logged: it is news, and was not just said."""
        before, self._why = self._why, why
        if why == before or not self._lines.is_due(why):
            return False
        self._logged = True
        return True

    def ends(self) -> bool:
        """It is right. True if that is to be logged: it was logged that it was wrong."""
        was_wrong, self._why = self._why is not None, None
        if not (was_wrong and self._logged and self._lines.is_due()):
            return False
        self._logged = False
        return True
