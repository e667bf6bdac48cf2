"""How log lines leave the process without ever stopping a relay.

Relay threads put their records into a bounded queue; one thread formats and writes them, all that have gathered at a
time. If whoever reads our log is stuck or gone, or the disk is full, the queue fills and records are dropped and
counted: a log must not be able to stop traffic. How many were lost is logged as soon as lines get through again.
"""

import contextlib
import logging
import queue
import threading
import time
from typing import Any

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs.sink import Sink
from tproxy_relay.settings import Settings

QUEUE_LENGTH = 10_000
"""Records that may wait for the writer."""

GATHER = 0.01
"""Seconds in which records may gather after some were written: a relay thread that wakes the writer has to give way to
it."""

MAX_AT_ONCE = 200
"""Records that are written in one piece: some 100 KiB."""

MAX_CHUNKS = 16
"""Pieces of the workers' logs that may wait for it too, up to 64 KiB each; more wait in the workers."""

DROP_REPORT_INTERVAL = 60.0
"""Seconds between two lines about dropped records, at least."""

log = logging.getLogger(__name__)

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
        """The sink that these settings want, for `change`. Raises SystemRefusedError for a file that cannot be
        written."""
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

    def debug_state(self) -> dict[str, int]:
        """For tests: `waiting`, the items in the queue, and `thread`, the writer's identifier (0: it has ended)."""
        return {"waiting": self._records.qsize(), "thread": self._thread.is_alive() and self._thread.ident or 0}

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
                with contextlib.suppress(OSError):  # of a file system that has gone
                    self._sink.close()
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
