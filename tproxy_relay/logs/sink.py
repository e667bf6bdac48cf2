"""Where log lines go: to a descriptor that was open already, or to a file that is opened again once it was moved away.

Only the writer's thread writes here. What could not be written is counted, and never complained of: a log must not be
able to stop traffic.
"""

import logging
import logging.handlers
import os
import sys
from collections.abc import Iterable

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs import formatters
from tproxy_relay.settings import Settings


class Unbuffered:
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
        """Do nothing: logging wants the method, and nothing is kept back here that could be flushed."""

    def fileno(self) -> int:
        """The descriptor that is written to."""
        return self._descriptor

    def close(self) -> None:
        """Close the descriptor; a rest of a line that is half out is lost."""
        os.close(self._descriptor)


class _LogFile(logging.handlers.WatchedFileHandler):
    """A file that is opened again when somebody has moved it away."""

    def _open(self) -> Unbuffered:  # type: ignore[override]
        return Unbuffered(os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666))

    def reopen_if_needed(self) -> None:
        """Also if it could not be opened the last time. OSError if it still cannot be."""
        self.reopenIfNeeded()
        if self.stream is None:
            self.stream = self._open()  # type: ignore[assignment]


class Sink:
    """What the writer writes to: a descriptor or a file, and the count of lines that it did not take."""

    def __init__(self, settings: Settings, descriptor: int | None) -> None:
        """To the file of these settings, or else to this descriptor; None: to nowhere. Raises SystemRefusedError for a
        file that cannot be written."""
        self.level = settings.log_level.upper()
        """For the root logger, as logging spells it."""
        self.lost = 0
        """Records and lines so far that could not be written."""
        self._formatter = formatters.formatter(settings.log_format)
        self._file: _LogFile | None = None
        self._stream = None if descriptor is None else Unbuffered(descriptor)
        ours = {"/dev/stdout": sys.__stdout__, "/dev/stderr": sys.__stderr__}.get(settings.log_file or "")
        if ours is not None:
            # Opening it anew would fail if it is a socket, or the pipe of another account.
            self._stream = Unbuffered(ours.fileno())
        elif settings.log_file:
            try:
                self._file = _LogFile(settings.log_file)
            except OSError as error:
                raise SystemRefusedError(f"cannot write log file {settings.log_file}: {error.strerror}") from error

    def write(self, records: Iterable[logging.LogRecord]) -> None:
        """Format these records and write their lines; what cannot be formatted or written is counted in `lost`."""
        lines = []
        for record in records:
            try:
                lines.append(self._formatter.format(record) + "\n")
            except Exception:  # a field that cannot be shown
                self.lost += 1
        if lines:
            self.write_lines("".join(lines).encode("utf-8", "backslashreplace"))

    def write_lines(self, lines: bytes) -> None:
        """Write lines that are made already, or count them in `lost`. A file that cannot be opened again is tried at
        the next call."""
        try:
            if self._file is not None:
                self._file.reopen_if_needed()
                self._stream = self._file.stream  # type: ignore[assignment]
            if self._stream is not None:
                self._stream.write(lines)
        except Exception:
            self.lost += lines.count(b"\n")

    def close(self) -> None:
        """Close the file, if the settings name one; a descriptor of the caller stays open."""
        if self._file is not None:
            self._file.close()
