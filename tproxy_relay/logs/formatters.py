"""What a log line looks like, and a record that is cheap to make.

The message of a line is constant, and the facts are fields: `key=value` in the console form, members in the
JSON form. Nothing here knows where a line goes.
"""

import json
import logging
import time
from collections.abc import Mapping
from datetime import datetime, timezone

try:
    from pythonjsonlogger.json import JsonFormatter
except ImportError:  # python-json-logger before 3.1
    from pythonjsonlogger.jsonlogger import JsonFormatter  # type: ignore[attr-defined]

from tproxy_relay.settings import LogFormat

_BLANK = vars(logging.makeLogRecord({}))

RESERVED = frozenset(_BLANK) | {"message", "asctime", "taskName"}
"""Attributes of a record that are logging's own: all others are fields of the line."""


def note(logger: logging.Logger, level: int, message: str, fields: Mapping[str, object]) -> None:
    """logger.log(level, message, extra=fields), for what is written of each connection: logging itself takes five times
    as long to make a record."""
    if logger.isEnabledFor(level):
        record = logging.LogRecord.__new__(logging.LogRecord)
        now = time.time()
        vars(record).update(
            _BLANK,
            name=logger.name,
            msg=message,
            levelno=level,
            levelname=logging.getLevelName(level),
            created=now,
            msecs=float(int(now % 1 * 1000)),
            **fields,
        )
        logger.handle(record)


class ConsoleFormatter(logging.Formatter):
    """`2026-11-22T21:04:05.678Z INFO connection closed id=... client=...`, one physical line a record.

    Times are UTC. Whatever is not printable is escaped, so that no field can forge a line or drive a terminal.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line for one record; a traceback follows on the same line, escaped."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [f"{when}.{int(record.msecs):03d}Z", record.levelname, _escape(record.getMessage())]
        parts += [f"{name}={_value(value)}" for name, value in vars(record).items() if name not in RESERVED]
        if record.exc_info:
            parts.append(f"traceback={_value(self.formatException(record.exc_info))}")
        return " ".join(parts)


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if isinstance(value, str) and (not text or any(char in ' "=' or not char.isprintable() for char in text)):
        text = json.dumps(text, ensure_ascii=False)
    return _escape(text)


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class LineFormatter(JsonFormatter):  # type: ignore[misc, unused-ignore]
    """`{"levelname": ..., "name": ..., "message": ..., fields ..., "timestamp": ...}`, on one line."""

    _encode = json.JSONEncoder().encode

    def __init__(self) -> None:
        # Old versions do not know the attributes that newer Pythons give a record, and would write them out.
        reserved = tuple(sorted(RESERVED))
        super().__init__("%(levelname)s %(name)s %(message)s", timestamp=True, reserved_attrs=reserved)

    def format(self, record: logging.LogRecord) -> str:
        """The line. Of plain values it is made here, which takes half the time; the library does the rest."""
        if not (record.exc_info or record.stack_info or record.args):
            line: dict[str, object] = {"levelname": record.levelname, "name": record.name, "message": record.msg}
            line.update([(name, value) for name, value in vars(record).items() if name not in RESERVED])
            line["timestamp"] = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
            try:
                return self._encode(line)
            except TypeError:  # a value that is not plain
                pass
        text: str = super().format(record)
        return text


def formatter(log_format: LogFormat) -> logging.Formatter:
    """The one for a value of the option log-format: `json`, or `console` for any other."""
    return LineFormatter() if log_format == "json" else ConsoleFormatter()
