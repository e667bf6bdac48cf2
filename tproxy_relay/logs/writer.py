"""Log lines: what they look like, and how they leave the process without ever stopping a relay.

Relay threads put their records into a bounded queue; one thread formats and writes them, all that have gathered at a
time. If whoever reads our log is stuck or gone, or the disk is full, the queue fills and records are dropped and
counted: a log must not be able to stop traffic. How many were lost is logged as soon as lines get through again.

The message of a line is constant, and the facts are fields: `key=value` in the console form, members in the
JSON form.
"""

import json
import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

try:
    from pythonjsonlogger.json import JsonFormatter
except ImportError:  # python-json-logger before 3.1
    from pythonjsonlogger.jsonlogger import JsonFormatter  # type: ignore[attr-defined]

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.settings import LogFormat, Settings

QUEUE_LENGTH = 10_000
"""Records that may wait for the writer."""

GATHER = 0.01
"""Seconds in which records may gather after some were written: a relay thread that wakes the writer has to give way to
it."""

MAX_AT_ONCE = 200
"""Records that are written in one piece: some 100 KiB."""

MAX_CHUNKS = 16
"""Pieces of the workers' logs that may wait for it too, up to 64 KiB each; more wait in the workers."""

DROP_REPORT_INTERVAL = 1.0
"""Seconds between two lines about dropped records, at least."""

_BLANK = vars(logging.makeLogRecord({}))
_RESERVED = frozenset(_BLANK) | {"message", "asctime", "taskName"}

log = logging.getLogger(__name__)


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
        parts += [f"{name}={_value(value)}" for name, value in vars(record).items() if name not in _RESERVED]
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
        reserved = tuple(sorted(_RESERVED))
        super().__init__("%(levelname)s %(name)s %(message)s", timestamp=True, reserved_attrs=reserved)

    def format(self, record: logging.LogRecord) -> str:
        """The line. Of plain values it is made here, which takes half the time; the library does the rest."""
        if not (record.exc_info or record.stack_info or record.args):
            line: dict[str, object] = {"levelname": record.levelname, "name": record.name, "message": record.msg}
            line.update([(name, value) for name, value in vars(record).items() if name not in _RESERVED])
            line["timestamp"] = datetime.fromtimestamp(record.created, timezone.utc).isoformat()
            try:
                return self._encode(line)
            except TypeError:  # a value that is not plain
                pass
        text: str = super().format(record)
        return text


def _formatter(log_format: LogFormat) -> logging.Formatter:
    return LineFormatter() if log_format == "json" else ConsoleFormatter()


Waiting = queue.SimpleQueue["logging.LogRecord | bytes | Sink | None"]
"""What the writer has still to do, in order: records, lines of workers, another place to write to. None makes it look
whether it is to stop."""


class _Enqueue(logging.Handler):
    """What the loggers call: never waits, never raises."""

    def __init__(self, records: "Waiting") -> None:
        super().__init__()
        self._records = records
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it as dropped. logging holds this handler's lock meanwhile."""
        if self._records.qsize() < QUEUE_LENGTH:
            self._records.put(record)
        else:
            self.dropped += 1


class _Unbuffered:
    """A stream that keeps nothing back but the rest of what is half out.

    Python's own streams keep what they could not write and write it later after all: on a full disk, lines
    would be counted as lost and then turn up.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""

    def write(self, lines: bytes) -> None:
        """Write whole lines. OSError if nothing of them is out."""
        owed = len(self._rest)
        data = self._rest + lines
        out = 0
        try:
            while out < len(data):
                out += os.write(self._descriptor, data[out:])
        except OSError:
            if out <= owed:
                self._rest = data[out:owed]
                raise
        self._rest = data[out:]

    def flush(self) -> None:
        """Nothing waits here for that."""

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._descriptor)


class _LogFile(logging.handlers.WatchedFileHandler):
    """A file that is opened again when somebody has moved it away."""

    def _open(self) -> _Unbuffered:  # type: ignore[override]
        return _Unbuffered(os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666))

    def reopen_if_needed(self) -> None:
        """Also if it could not be opened the last time. OSError if it still cannot be."""
        self.reopenIfNeeded()
        if self.stream is None:
            self.stream = self._open()  # type: ignore[assignment]


class Sink:
    """The writer's side: a descriptor or a file, and the count of lines that it did not take."""

    def __init__(self, settings: Settings, descriptor: int | None) -> None:
        """Raises SystemRefusedError for a file that cannot be written."""
        self.level = settings.log_level.upper()
        self.lost = 0
        self._formatter = _formatter(settings.log_format)
        self._file: _LogFile | None = None
        self._stream = None if descriptor is None else _Unbuffered(descriptor)
        ours = {"/dev/stdout": sys.__stdout__, "/dev/stderr": sys.__stderr__}.get(settings.log_file or "")
        if ours is not None:
            # Opening it anew would fail if it is a socket, or the pipe of another account.
            self._stream = _Unbuffered(ours.fileno())
        elif settings.log_file:
            try:
                self._file = _LogFile(settings.log_file)
            except OSError as error:
                raise SystemRefusedError(f"cannot write log file {settings.log_file}: {error.strerror}") from error

    def write(self, records: Iterable[logging.LogRecord]) -> None:
        """Write their lines or count them."""
        lines = []
        for record in records:
            try:
                lines.append(self._formatter.format(record) + "\n")
            except Exception:  # a field that cannot be shown
                self.lost += 1
        if lines:
            self.write_lines("".join(lines).encode("utf-8", "backslashreplace"))

    def write_lines(self, lines: bytes) -> None:
        """Lines that are made already, or count them. A file that cannot be opened again is tried at the next call."""
        try:
            if self._file is not None:
                self._file.reopen_if_needed()
                self._stream = self._file.stream  # type: ignore[assignment]
            if self._stream is not None:
                self._stream.write(lines)
        except Exception:
            self.lost += lines.count(b"\n")

    def close(self) -> None:
        """Close the file, if it is one."""
        if self._file is not None:
            self._file.close()


class LogWriter:
    """The queue and the thread that empties it. Between `start` and `stop`."""

    def __init__(self, settings: Settings, descriptor: int | None) -> None:
        """To this descriptor, if `settings` name no file; None: to nowhere."""
        self._records: Waiting = queue.SimpleQueue()
        self._room_for_chunks = threading.BoundedSemaphore(MAX_CHUNKS)
        self._entrance = _Enqueue(self._records)
        self._descriptor = descriptor
        self._sink = Sink(settings, descriptor)
        self._reported = 0
        self._reported_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)

    @property
    def dropped(self) -> int:
        """Records that never reached the log: no room in the queue, or the write failed."""
        return self._entrance.dropped + self._sink.lost

    def start(self) -> None:
        """Take over the root logger. Raises nothing; a sink that cannot be opened failed the constructor."""
        root = logging.getLogger()
        root.handlers[:] = [self._entrance]
        root.setLevel(self._sink.level)
        # Python's logging HOWTO, "Optimization": what a record is not to be told, because no line of ours says it.
        logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
        logging._srcfile = None
        self._thread.start()

    def open(self, settings: Settings) -> Sink:
        """What these settings want, for `change`. Raises SystemRefusedError."""
        return Sink(settings, self._descriptor)

    def change(self, sink: Sink) -> None:
        """Go on with that one after all that is queued. Raises SystemRefusedError, and goes on as before, if nobody
        reads the log."""
        if self._records.qsize() >= QUEUE_LENGTH:
            sink.close()
            raise SystemRefusedError("the log takes nothing at present")
        self._records.put(sink)
        logging.getLogger().setLevel(sink.level)

    def pass_on(self, lines: bytes) -> None:
        """Write lines of a worker; waits while there is no room, and the worker's pipe and queue fill meanwhile."""
        self._room_for_chunks.acquire()
        self._records.put(lines)

    def stop(self, seconds: float) -> None:
        """Write what is queued, as far as the sink lets us within `seconds`."""
        logging.getLogger().handlers[:] = [logging.NullHandler()]  # without any, logging writes to standard error
        self._stopping.set()
        self._records.put(None)
        self._thread.join(seconds)

    def _write(self) -> None:
        while True:
            try:
                first = self._records.get(timeout=DROP_REPORT_INTERVAL if self._unreported else None)
            except queue.Empty:
                first = None
            self._write_all(first)
            if self._unreported:
                self._report_drops()
            if self._stopping.is_set() and self._records.empty():
                return
            self._stopping.wait(GATHER)

    def _write_all(self, first: "logging.LogRecord | bytes | Sink | None") -> None:
        """That one, and what has gathered behind it."""
        records: list[logging.LogRecord] = []
        for item in (first, *(self._records.get() for _ in range(min(self._records.qsize(), MAX_AT_ONCE)))):
            if isinstance(item, logging.LogRecord):
                records.append(item)
            elif item is not None:
                self._sink.write(records)
                records.clear()
                self._write_other(item)
        self._sink.write(records)

    def _write_other(self, item: "bytes | Sink") -> None:
        if isinstance(item, bytes):
            self._sink.write_lines(item)
            self._room_for_chunks.release()
        else:
            item.lost, before, self._sink = self._sink.lost, self._sink, item
            before.close()

    @property
    def _unreported(self) -> int:
        return self.dropped - self._reported

    def _report_drops(self) -> None:
        now = time.monotonic()
        if now - self._reported_at < DROP_REPORT_INTERVAL and not self._stopping.is_set():
            return
        self._reported_at = now
        lost_before, dropped = self._sink.lost, self.dropped
        fields: dict[str, Any] = {"dropped": dropped - self._reported, "dropped_total": dropped}
        self._sink.write([_record("log records dropped", fields)])
        if self._sink.lost == lost_before:
            self._reported = dropped
        else:
            self._sink.lost = lost_before  # the report is no record of anybody's


def _record(message: str, fields: dict[str, Any]) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": log.name, "levelname": "WARNING", "levelno": logging.WARNING, "msg": message, **fields}
    )
