"""TCP over loopback, seen from the far ends: connected pairs, and what a peer does and sees.

In a pair, `far` is the test's end (the client, or the server) and `near` is the relay's, tuned the way the relay
tunes it. Far ends have a deadline on every call, so no test can hang in one.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from deadlines import PATIENCE

from tproxy_relay.net import sockets
from tproxy_relay.net.sockets import Tuning

UNTUNED = Tuning(keepalive=0, user_timeout=0, mark=0)
FIN, RST = "FIN", "RST"


class Pair(NamedTuple):
    """Both ends of one connection."""

    far: socket.socket
    near: socket.socket


def listen(host: str = "127.0.0.1", *, backlog: int = 128, receive_buffer: int = 0) -> socket.socket:
    """A listening socket on a free port."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.settimeout(PATIENCE)
    if receive_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    listener.bind((host, 0))
    listener.listen(backlog)
    return listener


def dial(address: tuple[str, int], *, receive_buffer: int = 0, source: str = "") -> socket.socket:
    """Connect to an address."""
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    sock.settimeout(PATIENCE)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    if source:
        sock.bind((source, 0))
    try:
        sock.connect(address[:2])
    except OSError:
        sock.close()
        raise
    return sock


def pair(*, receive_buffer: int = 0, tuning: Tuning = UNTUNED) -> Pair:
    """A connection whose near end came through a listener like the relay's."""
    with listen() as listener:
        sockets.tune(listener, tuning)
        far = dial(listener.getsockname(), receive_buffer=receive_buffer)
        near, _address = listener.accept()
    near.setblocking(True)
    return Pair(far, near)


def reset(sock: socket.socket) -> None:
    """Close with a RST instead of a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
    sock.close()


def read_to_end(sock: socket.socket, seconds: float = PATIENCE) -> tuple[bytes, str]:
    """All that still comes, and how it ends: FIN or RST. TimeoutError if it does not end."""
    sock.settimeout(seconds)
    parts: list[bytes] = []
    while True:
        try:
            data = sock.recv(1 << 20)
        except (ConnectionResetError, BrokenPipeError):
            return b"".join(parts), RST
        if not data:
            return b"".join(parts), FIN
        parts.append(data)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """Just so many bytes; AssertionError if the stream ends before."""
    parts = bytearray()
    while len(parts) < count:
        data = sock.recv(count - len(parts))
        assert data, f"FIN after {len(parts)} bytes of {count}"
        parts += data
    return bytes(parts)


def fill(sock: socket.socket) -> int:
    """Send until nothing has gone through for half a second: everything on the way is full. Returns the bytes."""
    sock.settimeout(0.5)
    sent = 0
    while sent < 1 << 28:
        try:
            sent += sock.send(bytes(1 << 18))
        except TimeoutError:
            sock.settimeout(PATIENCE)
            return sent
    raise AssertionError("no end to what this connection takes in: nothing holds the sender back")


def pattern(count: int) -> bytes:
    """Bytes in which every mistake of order or number shows: four-byte counters."""
    return b"".join(number.to_bytes(4, "big") for number in range((count + 3) // 4))[:count]


def is_reset(sock: socket.socket) -> bool:
    """True once the connection of this end is dead."""
    return sockets.is_dead(sock)


@contextmanager
def full_backlog() -> Iterator[tuple[str, int]]:
    """The address of a listener whose backlog is full: the kernel drops further SYNs, so a connect hangs."""
    with listen(backlog=0) as listener:
        address = listener.getsockname()
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket()
                fillers.append(filler)
                filler.setblocking(False)
                try:
                    filler.connect(address)
                except BlockingIOError:
                    continue
            yield address
        finally:
            for filler in fillers:
                filler.close()
