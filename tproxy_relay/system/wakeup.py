"""Waking the main thread out of its epoll: by a signal, or from another thread.

Signal handlers only queue. The kernel may deliver a signal to any thread, but Python runs its handler in the
main thread only, and that one sleeps in epoll; so the interpreter also writes to this socket pair
(signal.set_wakeup_fd), which the epoll watches.
"""

import signal
import socket
from collections import deque
from collections.abc import Iterable
from types import FrameType


class Wakeup:
    """A socket pair whose read end becomes readable when somebody wants the main thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._signals: deque[int] = deque()

    def fileno(self) -> int:
        """The descriptor to watch: readable when there are wake-ups, or signals to take with `signals`."""
        return self._reader.fileno()

    def catch(self, signals: Iterable[signal.Signals]) -> None:
        """Queue these signals from now on. Main thread only (ValueError elsewhere)."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, self._queue)

    def _queue(self, number: int, _frame: FrameType | None) -> None:
        self.notify(signal.Signals(number))

    def notify(self, number: signal.Signals | None = None) -> None:
        """Wake the main thread, from any thread; with a signal's number, as if that signal had come."""
        if number is not None:
            self._signals.append(number)
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            return  # full of wake-ups that nobody has read yet: one more says nothing new

    def clear(self) -> None:
        """Take all wake-ups, so that the descriptor is no longer readable; signals stay queued."""
        try:
            while self._reader.recv(4096):
                continue
        except BlockingIOError:
            return  # read empty

    def signals(self) -> list[signal.Signals]:
        """Take the wake-ups, and the signals that have come since the last call, oldest first."""
        self.clear()
        taken = []
        while self._signals:
            taken.append(signal.Signals(self._signals.popleft()))
        return taken

    def close(self) -> None:
        """Close both sockets. Signals that are still caught must not come after that."""
        self._reader.close()
        self._writer.close()
