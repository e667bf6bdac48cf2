"""Much data in one direction, and what becomes of it: with and without a relay on the way."""

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from interception import FAMILIES, PORT

from tproxy_relay.lab import Host
from tproxy_relay.net.endpoint import from_sockaddr

SIZE = 300_000
"""Bytes of a transfer."""
DATA = os.urandom(SIZE)
_DIGEST = hashlib.sha256(DATA).digest()


class Transfer(NamedTuple):
    """What came of one: the client's address, a short phrase, and seconds."""

    client: str
    saw: str
    seconds: float


def _serve(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        if sock.recv(1) == b"d":
            sock.sendall(DATA)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)
        else:
            got = hashlib.sha256()
            while data := sock.recv(65536):
                got.update(data)
            sock.sendall(got.digest())


@contextlib.contextmanager
def transfer_servers(*hosts: Host) -> Iterator[None]:
    """Who gives and takes them, on these hosts, both families."""
    listeners = [host.listen(PORT, family) for host in hosts for family in FAMILIES.values()]
    stopped = threading.Event()

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stopped.is_set():
                threading.Thread(target=_serve, args=(listener.accept()[0],), daemon=True).start()

    threads = [threading.Thread(target=accept, args=(listener,), daemon=True) for listener in listeners]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for listener in listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in threads:
            thread.join()


def transfer(source: Host, destination: Host, family: int, direction: str, patience: float) -> Transfer:
    """A new connection, and data `down` to the source or `up` from it."""
    began = time.monotonic()
    with source.socket(family) as sock:
        sock.settimeout(patience)
        try:
            sock.connect((destination.address(family), PORT))
        except OSError as error:
            return Transfer(_name(sock), type(error).__name__, time.monotonic() - began)
        return finish(direction, sock)._replace(seconds=time.monotonic() - began)


def finish(direction: str, sock: socket.socket) -> Transfer:
    """The same on a connection that is there: 'complete', or how much came and how it ended."""
    name, began, got = _name(sock), time.monotonic(), b""
    wanted = DATA if direction == "down" else _DIGEST
    with sock:
        try:
            sock.sendall(b"d" if direction == "down" else b"u" + DATA)
            if direction == "up":
                sock.shutdown(socket.SHUT_WR)
            while len(got) < len(wanted) and (data := sock.recv(65536)):
                got += data
        except OSError as error:
            return Transfer(name, f"{len(got)} bytes, {type(error).__name__}", time.monotonic() - began)
    return Transfer(name, "complete" if got == wanted else f"{len(got)} bytes", time.monotonic() - began)


def _name(sock: socket.socket) -> str:
    return str(from_sockaddr(sock.getsockname()))
