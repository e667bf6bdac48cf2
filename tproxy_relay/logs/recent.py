"""The last warnings and errors, for those who ask what was wrong."""

import logging
from collections import Counter, deque

from tproxy_relay.logs.formatters import RESERVED

MAX_KEPT = 20
"""Lines; an older one makes room for each further one."""


class Problems(logging.Handler):
    """Keeps what this process has logged from WARNING on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: deque[dict[str, object]] = deque(maxlen=MAX_KEPT)
        self.counts: Counter[str] = Counter()
        """How often each message was logged; messages are constant."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line, and count its message. logging holds this handler's lock meanwhile."""
        fields = {name: str(value) for name, value in vars(record).items() if name not in RESERVED}
        line = {"time": record.created, "level": record.levelname, "message": record.getMessage(), **fields}
        self._kept.append(line)
        self.counts[record.msg if isinstance(record.msg, str) else record.levelname] += 1

    @property
    def last(self) -> list[dict[str, object]]:
        """The lines that are kept, oldest first: time (seconds since 1970), level, message, and the fields as text."""
        return list(self._kept)
