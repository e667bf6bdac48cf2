"""What goes on being so is logged once, not each time that it is found to be so: a log is for people.

Nothing here logs anything, or is for several threads at a time.
"""

import time

INTERVAL = 60.0
"""Seconds for which a line is not repeated."""


class Seldom:
    """Lines that may come again and again, each so many times in INTERVAL seconds at the most."""

    def __init__(self, most: int = 1) -> None:
        self._most = most
        self._said: list[tuple[float, tuple[str, ...]]] = []

    def is_due(self, *line: str) -> bool:
        """True if what these words tell is to be logged now: it was not too often within the last INTERVAL seconds."""
        now = time.monotonic()
        self._said = [(at, one) for at, one in self._said if now - at < INTERVAL]
        if sum(one == line for _, one in self._said) >= self._most:
            return False
        self._said.append((now, line))
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
