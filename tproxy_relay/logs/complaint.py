"""What goes on being wrong is said once, and once more when it is over: not each time that it is found to be so."""

import logging
import time

INTERVAL = 60.0
"""Seconds for which a line is not repeated, also where what is wrong comes and goes."""


class Complaint:
    """One thing that can be wrong for a while. Not for several threads at a time."""

    def __init__(self, log: logging.Logger, level: int = logging.ERROR) -> None:
        self._log = log
        self._level = level
        self._said: dict[str, float] = {}
        self._going_on: str | None = None
        self._to_end = False

    def __bool__(self) -> bool:
        """True while it is wrong."""
        return self._going_on is not None

    def say(self, line: str, **fields: object) -> None:
        """It is wrong, as this line says: it is logged unless it goes on, or was logged just now."""
        before, self._going_on = self._going_on, line
        if line != before and self._may(line):
            self._log.log(self._level, "%s", line, extra=fields)
            self._to_end = True

    def over(self, line: str, **fields: object) -> None:
        """It is right again, which is logged if it was logged that it was wrong."""
        if self._going_on is not None and self._to_end and self._may(line):
            self._log.info("%s", line, extra=fields)
            self._to_end = False
        self._going_on = None

    def _may(self, line: str) -> bool:
        now = time.monotonic()
        self._said = {said: at for said, at in self._said.items() if now - at < INTERVAL}
        return self._said.setdefault(line, now) == now
