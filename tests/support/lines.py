"""The log lines of the relay, collected by an ordinary handler."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from deadlines import wait_until

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class Lines(logging.Handler):
    """Every record so far, oldest first."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)

    def of(self, message: str) -> list[logging.LogRecord]:
        """The records with just this message."""
        return [record for record in list(self.records) if record.getMessage() == message]

    def closed(self, count: int = 1) -> list[dict[str, object]]:
        """The fields of the access lines, once there are so many."""
        wait_until(lambda: len(self.of("connection closed")) >= count, f"{count} connections are closed")
        return [fields(record) for record in self.of("connection closed")]

    def outcomes(self, count: int = 1) -> list[object]:
        """How they ended, once so many have."""
        return [line["outcome"] for line in self.closed(count)]


def fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


@contextmanager
def collected() -> Iterator[Lines]:
    """All lines of the package while this lasts."""
    logger, lines = logging.getLogger("tproxy_relay"), Lines()
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
