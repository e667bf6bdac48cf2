"""The last warnings and errors, for those who ask what was wrong."""

import logging
from collections import Counter, deque

MOST = 20
"""That are kept."""

_BLANK = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Problems(logging.Handler):
    """Keeps what this process has logged from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[dict[str, object]] = deque(maxlen=MOST)
        self.counts: Counter[str] = Counter()
        """By the message, which is constant."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it. logging holds this handler's lock meanwhile."""
        fields = {name: str(value) for name, value in vars(record).items() if name not in _BLANK}
        line = {"time": record.created, "level": record.levelname, "message": record.getMessage(), **fields}
        self._kept.append(line)
        self.counts[record.msg if isinstance(record.msg, str) else record.levelname] += 1

    @property
    def last(self) -> list[dict[str, object]]:
        """Oldest first."""
        return list(self._kept)
