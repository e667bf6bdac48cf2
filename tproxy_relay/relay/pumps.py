"""Both directions of one connection: two pumps, and what each end did shown to the other end.

Two threads call `carry`, one for each direction. Each blocks in recv or send, and only there; neither looks at
the bytes. This file knows how a TCP conversation ends, not who asked for it or what is written about it.

    a FIN from one side     a FIN to the other, and the opposite direction goes on for as long as it takes
    a reset from one side   the other gets all the data that came before it, then a reset
    `abort` from outside    a reset to both, at once

The sockets come armed (sockets.tune): whatever happens to this process, they end with a reset until both
FINs are through. Nobody but the last thread that leaves may close them, because a descriptor number that is
used again would make the other thread's call hit a stranger.
"""

import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from tproxy_relay.net import sockets
from tproxy_relay.relay.read_buffer import ReadBuffer
from tproxy_relay.system.cpu import CpuPlacement

FLUSH_TIMEOUT = 5.0
"""Seconds without progress after which a peer that acknowledges nothing gets its reset with data undelivered."""


class Leg:
    """One side of a connection: its socket and what has happened on it.

    `sent` and `moved_at` have one writing thread each way; readers may see them a moment late.
    """

    __slots__ = ("name", "sock", "sent", "moved_at", "eof", "fin_sent", "error")

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name = name
        self.sock = sock
        self.sent = 0
        self.moved_at = time.monotonic()
        self.eof = False
        self.fin_sent = False
        self.error: OSError | None = None


class HangupWatch(Protocol):
    """Tells of a reset on a socket that nobody reads any more (its FIN has come), by `Relay.hang_up`."""

    def add(self, relay: "Relay", leg: Leg) -> None:
        """Watch a leg of that relay until it hangs up once."""

    def discard(self, leg: Leg) -> None:
        """Stop watching; not watched is fine."""


class Relay:
    """The two legs and the state that both pumps share."""

    __slots__ = (
        "client",
        "upstream",
        "failed",
        "bug",
        "_watch",
        "_cpu",
        "_lock",
        "_pumps",
        "_stopped",
        "_aborted",
        "_hangup_patience",
    )

    def __init__(self, client: Leg, upstream: Leg, watch: HangupWatch, cpu: CpuPlacement) -> None:
        self.client = client
        self.upstream = upstream
        upstream.moved_at = time.monotonic()  # connecting is no idle time
        self.failed: Leg | None = None
        self.bug: Exception | None = None
        self._watch = watch
        self._cpu = cpu
        self._lock = threading.Lock()
        self._pumps = 2
        self._stopped = False
        self._aborted = False
        self._hangup_patience = Patience()

    @property
    def half_closed(self) -> bool:
        """True after the first FIN, from either side."""
        return self.client.eof or self.upstream.eof

    @property
    def moved_at(self) -> float:
        """When a byte last moved, either way (time.monotonic())."""
        return max(self.client.moved_at, self.upstream.moved_at)

    @property
    def clean(self) -> bool:
        """True if both FINs are through and nothing failed."""
        return self.client.eof and self.upstream.eof and not self._stopped and self.failed is None

    def carry(self, src: Leg, dst: Leg) -> bool:
        """Pump one direction to its end and pass that end on. True for the last of the two to return."""
        try:
            with ReadBuffer(src.sock, self._cpu) as reader:
                pump(reader, src, dst, self._is_stopped)
            if not self._stopped:
                self._pass_on(src, dst)
        except Exception as bug:  # both peers must see a reset, and the record needs the traceback
            self.bug = bug
            self.abort()
        return self._leave()

    def _is_stopped(self) -> bool:
        return self._stopped

    def _pass_on(self, src: Leg, dst: Leg) -> None:
        if src.eof and src.error is None and not src.fin_sent and sockets.is_dead(src.sock):
            # The kernel reports a reset once, to whichever call comes first: the other pump's send() may
            # have taken it, and then recv() here says 0 as if a FIN had come.
            src.error = _reset_by_peer()
        if src.error is not None:
            self._fail(src, stop=True)
            sockets.wake_reader(dst.sock)
        elif dst.error is not None:
            self._fail(dst, stop=False)  # what dst sent before it died is still to be read, by the other pump
            sockets.wake_reader(dst.sock)
        else:
            self._pass_on_fin(src, dst)

    def _fail(self, leg: Leg, *, stop: bool) -> None:
        with self._lock:
            self.failed = self.failed or leg
            self._stopped = self._stopped or stop

    def _pass_on_fin(self, src: Leg, dst: Leg) -> None:
        with self._lock:
            dst.fin_sent = True
            self._watch.discard(dst)  # our own FIN would wake the watcher for nothing
            if self._pumps == 2:
                self._watch.add(self, src)
        sockets.half_close(dst.sock)

    def _leave(self) -> bool:
        with self._lock:
            self._pumps -= 1
            if self._pumps == 0:
                self._watch.discard(self.client)
                self._watch.discard(self.upstream)
            return self._pumps == 0

    def hang_up(self, leg: Leg) -> bool:
        """A watched leg may have been reset. True when that is dealt with; False: ask again soon.

        While the other peer has not acknowledged everything, its reader is left alone: once it is woken by
        SHUT_RD after our FIN, the kernel answers more of its data with a reset and throws our data away.
        """
        other = self.upstream if leg is self.client else self.client
        with self._lock:
            if self._pumps == 0 or self._stopped or leg.fin_sent or not sockets.is_dead(leg.sock):
                return True
            if not sockets.is_dead(other.sock) and not self._hangup_patience.ended(other.sock):
                return False
            leg.error = _reset_by_peer()
            self.failed = self.failed or leg
            self._stopped = True
            sockets.wake_reader(other.sock)
            return True

    def abort(self) -> None:
        """End both directions at once, from any thread; both peers will see a reset."""
        with self._lock:
            self._stopped = self._aborted = True
            if self._pumps:
                sockets.wake_reader(self.client.sock)
                sockets.wake_reader(self.upstream.sock)

    def flush(self) -> None:
        """Before the reset of a broken connection: let a healthy peer have the data that came before it.

        Returns when its kernel has acknowledged everything, when it has acknowledged nothing more for
        FLUSH_TIMEOUT seconds, or at `abort`. For the last thread that left.
        """
        pause = 0.001
        for leg in (self.client, self.upstream):
            patience = Patience()
            while not (self._aborted or leg.error or patience.ended(leg.sock) or sockets.is_dead(leg.sock)):
                time.sleep(pause)
                pause = min(pause * 2, 0.05)


class Patience:
    """Waiting for a peer to acknowledge what is queued for it, as long as it gets on with it."""

    __slots__ = ("_left", "_progress_at")

    def __init__(self) -> None:
        self._left = -1
        self._progress_at = 0.0

    def ended(self, sock: socket.socket) -> bool:
        """True if nothing is queued any more, or FLUSH_TIMEOUT seconds have gone by without progress."""
        left, now = sockets.unacknowledged(sock), time.monotonic()
        if self._left < 0 or left < self._left:
            self._progress_at = now
        self._left = left
        return left == 0 or now - self._progress_at > FLUSH_TIMEOUT


def _reset_by_peer() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def pump(reader: ReadBuffer, src: Leg, dst: Leg, stopped: Callable[[], bool]) -> None:
    """Copy from src, by its reader, to dst until src's FIN (src.eof), an error (src.error or dst.error), or
    `stopped`."""
    while True:
        try:
            data = reader.read()
        except BlockingIOError:
            reader.rest()
            continue
        except OSError as error:
            src.error = error.with_traceback(None)  # which would keep this frame, and the bulk buffer in it
            return
        if stopped():
            return
        if not data:
            src.eof = True
            return
        if not _send_all(data, src, dst, stopped):
            return
        del data  # a view of the bulk buffer would keep it mapped while the next read waits


def _send_all(data: bytes | memoryview, src: Leg, dst: Leg, stopped: Callable[[], bool]) -> bool:
    """False if dst failed or nobody wants the rest any more."""
    while True:
        try:
            sent = dst.sock.send(data)
        except BlockingIOError:  # no room for SEND_TICK seconds: the peer does not read, and that is its right
            sent = 0
            if _was_reset_behind_our_back(src):
                src.error = _reset_by_peer()
                return False
        except OSError as error:
            dst.error = error.with_traceback(None)
            return False
        if sent:
            dst.sent += sent
            src.moved_at = time.monotonic()
        if sent == len(data):
            return True
        if stopped():
            return False
        data = memoryview(data)[sent:]


def _was_reset_behind_our_back(src: Leg) -> bool:
    """Nobody reads a source while its destination takes nothing. If it is reset meanwhile, that must not wait for
    ever. (After our own FIN a dead socket may be one whose FIN has come and waits to be read.)"""
    rests = time.monotonic() - src.moved_at > FLUSH_TIMEOUT
    return rests and not src.fin_sent and sockets.is_dead(src.sock)
