"""recv(2) with a buffer that grows with the stream and shrinks when it rests."""

import mmap
import socket

from tproxy_relay.net import sockets
from tproxy_relay.system.cpu import CpuPlacement

SMALL_READ = 1024
"""Bytes. What a resting connection costs; a message that fills it makes the next read larger."""
LARGE_READ = 64 * 1024
"""Bytes. Above this, recv() would map and unmap fresh memory at every call (malloc's mmap threshold)."""
BULK_READ = 512 * 1024
"""Bytes, read into one mapping that is kept while the stream flows: measured best for throughput."""
BULK_REST = 2.0
"""Seconds of silence after which a bulk buffer is given back."""
SMALL_READS_IN_BULK = 16
"""In a row, after which it is given back too: the stream has become a trickle."""
ESTABLISHED = 16
"""Reads after which a connection is one of many messages: shorter ones do not pay two system calls for it."""


class ReadBuffer:
    """What one pump reads with.

    A connection of small messages waits with SMALL_READ bytes in hand; a full read makes the next one four times as
    large, up to LARGE_READ, and a short one small again; after a full LARGE_READ one mapping of BULK_READ bytes
    serves until the stream rests, and the thread runs on any processor meanwhile. One that has been at work for a
    while makes room for others (system/cpu.py).

    For one thread, in a `with`: at its end the thread is again as it was.
    """

    __slots__ = ("_sock", "_cpu", "_size", "_bulk", "_small_reads", "_reads_left", "_waits")

    def __init__(self, sock: socket.socket, cpu: CpuPlacement) -> None:
        self._sock = sock
        self._cpu = cpu
        self._size = SMALL_READ
        self._bulk: memoryview | None = None
        self._small_reads = 0
        self._reads_left = ESTABLISHED
        self._waits = False

    def __enter__(self) -> "ReadBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bulk is not None:
            self._cpu.stay()
        if self._waits:
            self._cpu.push_ahead()

    def read(self) -> bytes | memoryview:
        """What recv gives, empty at the FIN; a view is good until the next call. BlockingIOError after
        BULK_REST seconds of silence in bulk; OSError of recv(2)."""
        if self._bulk is not None:
            return self._read_bulk(self._bulk)
        data = self._sock.recv(self._size)
        got = len(data)
        if self._reads_left:
            self._reads_left -= 1
            if not self._reads_left:
                self._waits = self._cpu.wait_for_others()
        if got == self._size:
            self._grow()
        elif got < SMALL_READ:
            self._size = SMALL_READ
        return data

    def _read_bulk(self, bulk: memoryview) -> memoryview:
        got = self._sock.recv_into(bulk)
        self._small_reads = 0 if got >= SMALL_READ else self._small_reads + 1
        if self._small_reads == SMALL_READS_IN_BULK:
            self.rest()
        return bulk[:got]

    def _grow(self) -> None:
        if self._size < LARGE_READ:
            self._size *= 4
            return
        try:
            mapped = mmap.mmap(-1, BULK_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError):
            return  # no room for a large buffer: the stream goes on with the small one
        self._bulk = memoryview(mapped)
        self._small_reads = 0
        self._cpu.roam()
        sockets.set_receive_timeout(self._sock, BULK_REST)

    def rest(self) -> None:
        """Give the bulk buffer back: it is unmapped with the last view of it."""
        self._bulk = None
        self._size = SMALL_READ
        self._cpu.stay()
        sockets.set_receive_timeout(self._sock, 0)
