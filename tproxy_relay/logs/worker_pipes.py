"""The log lines of the workers, on their way through the supervisor to the one log.

A worker has two pipes. Through one come lines that are ready to be written; through the other its last words, if it
crashes or cannot start, which become records here. One thread reads them all. When the log does not take any more,
nothing is read, and the worker counts what it has to drop.
"""

import contextlib
import fcntl
import logging
import os
import selectors
import signal
import threading
import time
from collections import deque

from tproxy_relay.logs.writer import LogWriter

PIPE_BYTES = 1024 * 1024
"""That a worker may write before somebody reads; an ordinary process may ask for no more (pipe(7))."""
CHUNK = 64 * 1024
"""Bytes of one read."""
GATHER = 0.01
"""Seconds in which lines may gather after some were read: to be woken for each of them would cost the workers more than
the writing does."""
LAST_WORDS = 20
"""Lines of a worker that are kept for the message about its end."""

log = logging.getLogger(__name__)


class Words:
    """What one worker has said on its standard error."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pid = 0
        self.lines: deque[str] = deque(maxlen=LAST_WORDS)
        """The last ones, oldest first."""
        self.ended = threading.Event()
        """Set once the other end is closed and all is read."""

    def belong_to(self, pid: int) -> None:
        """Say which process it is, for the log lines; until then that is 0."""
        self._pid = pid

    def take(self, line: str) -> None:
        """Keep one line, without its newline, and log it as an error."""
        self.lines.append(line)
        log.error("a worker has said", extra={"pid": self._pid, "text": line})

    @property
    def last(self) -> str:
        """The last line; '' if there was none."""
        return self.lines[-1] if self.lines else ""


class LogPipes:
    """The reading ends, and the thread that reads them."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._rest: dict[int, bytes] = {}
        self._open = 0
        self._all_closed = threading.Event()
        self._all_closed.set()
        self._closing = False
        self._thread = threading.Thread(target=self._read_all, name="log pipes", daemon=True)
        self._thread.start()

    def add(self) -> tuple[int, int, Words]:
        """Pipes for a new worker: the ends that it writes to, for its log and for its last words. They are the
        caller's to close. Raises OSError."""
        lines, log_end = os.pipe()
        try:
            words_end, last_words_end = os.pipe()
        except OSError:
            os.close(lines)
            os.close(log_end)
            raise
        with contextlib.suppress(OSError):  # fs.pipe-user-pages-soft
            fcntl.fcntl(lines, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        words = Words(words_end)
        with self._lock:
            self._open += 2
            self._all_closed.clear()
            self._selector.register(lines, selectors.EVENT_READ, None)
            self._selector.register(words_end, selectors.EVENT_READ, words)
        return log_end, last_words_end, words

    def drain(self, seconds: float) -> None:
        """Wait until all workers have closed their ends and everything is passed on."""
        self._all_closed.wait(seconds)

    def close(self, seconds: float) -> None:
        """As `drain`, and the thread ends with the last pipe. A process that ends need not call it."""
        ends = self.add()[:2]
        self._closing = True
        for end in ends:
            os.close(end)  # which wakes the thread, if all the others were closed before
        self._thread.join(seconds)

    def debug_state(self) -> dict[str, int]:
        """For tests: `open`, the pipes that are not at their end yet."""
        return {"open": self._open}

    def _read_all(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self._open or not self._closing:
            # An empty selector waits too; a descriptor that is added meanwhile wakes the epoll behind it.
            for key, _ in self._selector.select():
                self._read(key.fd, key.data)
            time.sleep(GATHER)
        self._selector.close()

    def _read(self, fd: int, words: Words | None) -> None:
        chunk = os.read(fd, CHUNK)
        whole, newline, rest = (self._rest.pop(fd, b"") + chunk).rpartition(b"\n")
        data = whole + newline
        if rest and chunk and len(rest) < CHUNK:
            self._rest[fd] = rest
        elif rest:
            data += rest + b"\n"  # it died in the middle of a line, or the line is endless
        if data and words is None:
            self._writer.pass_on(data)
        elif data and words is not None:
            for line in data.decode(errors="replace").splitlines():
                words.take(line)
        if not chunk:
            self._close(fd, words)

    def _close(self, fd: int, words: Words | None) -> None:
        with self._lock:
            self._selector.unregister(fd)
            os.close(fd)
            self._open -= 1
            if not self._open:
                self._all_closed.set()
        if words is not None:
            words.ended.set()
