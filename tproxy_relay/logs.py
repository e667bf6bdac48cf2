"""Log lines: what they look like, and how they leave the process without ever stopping a relay.

Relay threads put their records into a bounded queue; one thread formats and writes them. If whoever reads our
log is stuck or gone, or the disk is full, the queue fills and records are dropped and counted: a log must not
be able to stop traffic. How many were lost is logged as soon as lines get through again.

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
from typing import Any

try:
    from pythonjsonlogger.json import JsonFormatter
except ImportError:  # python-json-logger before 3.1
    from pythonjsonlogger.jsonlogger import JsonFormatter  # type: ignore[attr-defined]

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.settings import Settings

QUEUE_LENGTH = 10_000
"""Records that may wait for the writer."""

MOST_CHUNKS = 16
"""Pieces of the workers' logs that may wait for it too, up to 64 KiB each; more wait in the workers."""

DROP_REPORT_INTERVAL = 1.0
"""Seconds between two lines about dropped records, at least."""

_RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

log = logging.getLogger(__name__)


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


def _formatter(log_format: str) -> logging.Formatter:
    if log_format == "json":
        # Old versions do not know the attributes that newer Pythons give a record, and would write them out.
        formatter: logging.Formatter = JsonFormatter(
            "%(levelname)s %(name)s %(message)s", timestamp=True, reserved_attrs=tuple(sorted(_RESERVED))
        )
        return formatter
    return ConsoleFormatter()


class _Enqueue(logging.Handler):
    """What the loggers call: never waits, never raises."""

    def __init__(self, records: "queue.Queue[logging.LogRecord | bytes | Sink | None]") -> None:
        super().__init__()
        self._records = records
        self.dropped = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record, or count it as dropped. logging holds this handler's lock meanwhile."""
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class _Unbuffered:
    """The stream of a handler. Keeps nothing back but the rest of a line that is half out.

    Python's own streams keep what they could not write and write it later after all: on a full disk, lines
    would be counted as lost and then turn up.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""

    def write(self, text: str) -> None:
        """Write one line. OSError if nothing of it is out."""
        self.write_bytes(text.encode("utf-8", "backslashreplace"))

    def write_bytes(self, lines: bytes) -> None:
        """Write some lines that are made already. OSError if nothing of them is out."""
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
        self.handler: logging.StreamHandler[Any]
        ours = {"/dev/stdout": sys.__stdout__, "/dev/stderr": sys.__stderr__}.get(settings.log_file or "")
        if ours is not None:
            # Opening it anew would fail if it is a socket, or the pipe of another account.
            self.handler = logging.StreamHandler(_Unbuffered(ours.fileno()))
        elif settings.log_file:
            try:
                self.handler = _LogFile(settings.log_file)
            except OSError as error:
                raise SystemRefusedError(f"cannot write log file {settings.log_file}: {error.strerror}") from error
        else:
            self.handler = logging.StreamHandler(None if descriptor is None else _Unbuffered(descriptor))
        self.handler.setFormatter(_formatter(settings.log_format))
        self.handler.handleError = self._count  # type: ignore[method-assign]

    def write(self, record: logging.LogRecord) -> None:
        """Write it or count it. A log file that cannot be opened again raises outside of handleError; the handler
        tries again at the next record."""
        try:
            self.handler.handle(record)
        except Exception:
            self.lost += 1

    def write_lines(self, lines: bytes) -> None:
        """Lines that a worker has made."""
        try:
            if isinstance(self.handler, _LogFile):
                self.handler.reopen_if_needed()
            if self.handler.stream is not None:
                self.handler.stream.write_bytes(lines)
        except Exception:
            self.lost += lines.count(b"\n")

    def close(self) -> None:
        """Close the file, if it is one."""
        if isinstance(self.handler, _LogFile):
            self.handler.close()

    def _count(self, record: logging.LogRecord) -> None:
        """In place of logging's traceback on standard error, which may be the very thing that is broken."""
        self.lost += 1


class LogWriter:
    """The queue and the thread that empties it. Between `start` and `stop`."""

    def __init__(self, settings: Settings, descriptor: int | None) -> None:
        """To this descriptor, if `settings` name no file; None: to nowhere."""
        self._records: queue.Queue[logging.LogRecord | bytes | Sink | None] = queue.Queue(QUEUE_LENGTH)
        self._room_for_chunks = threading.BoundedSemaphore(MOST_CHUNKS)
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
        self._thread.start()

    def open(self, settings: Settings) -> Sink:
        """What these settings want, for `change`. Raises SystemRefusedError."""
        return Sink(settings, self._descriptor)

    def change(self, sink: Sink) -> None:
        """Go on with that one after all that is queued. Raises SystemRefusedError, and goes on as before, if nobody
        reads the log."""
        try:
            self._records.put_nowait(sink)
        except queue.Full as error:
            sink.close()
            raise SystemRefusedError("the log takes nothing at present") from error
        logging.getLogger().setLevel(sink.level)

    def pass_on(self, lines: bytes) -> None:
        """Write lines of a worker; waits while there is no room, and the worker's pipe and queue fill meanwhile."""
        self._room_for_chunks.acquire()
        self._records.put(lines)

    def stop(self, seconds: float) -> None:
        """Write what is queued, as far as the sink lets us within `seconds`."""
        logging.getLogger().handlers[:] = [logging.NullHandler()]  # without any, logging writes to standard error
        self._stopping.set()
        try:
            self._records.put_nowait(None)
        except queue.Full:
            pass  # the writer looks at _stopping too
        self._thread.join(seconds)

    def _write(self) -> None:
        while True:
            try:
                record = self._records.get(timeout=DROP_REPORT_INTERVAL if self._unreported else None)
            except queue.Empty:
                record = None
            if isinstance(record, Sink):
                record.lost, before, self._sink = self._sink.lost, self._sink, record
                before.close()
            elif isinstance(record, bytes):
                self._sink.write_lines(record)
                self._room_for_chunks.release()
            elif record is not None:
                self._sink.write(record)
            if self._unreported:
                self._report_drops()
            if self._stopping.is_set() and self._records.empty():
                return

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
        self._sink.write(_record("log records dropped", fields))
        if self._sink.lost == lost_before:
            self._reported = dropped
        else:
            self._sink.lost = lost_before  # the report is no record of anybody's


def _record(message: str, fields: dict[str, Any]) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": log.name, "levelname": "WARNING", "levelno": logging.WARNING, "msg": message, **fields}
    )
