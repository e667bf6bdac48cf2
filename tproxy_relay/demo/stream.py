"""One end of the throughput measurement, as a program: the demo must not share its interpreter lock with it.

Run as a script, with a connected socket as an inherited descriptor:

    stream.py send DESCRIPTOR SECONDS       sends for so long, then a FIN, and waits for the other's FIN
    stream.py receive DESCRIPTOR            reads to the end, then prints bytes and seconds
"""

import os
import socket
import sys
import time

CHUNK = 1 << 20


def send(sock: socket.socket, seconds: float) -> None:
    """Send random bytes for so many seconds, as fast as it goes, then a FIN; return when the other end has closed."""
    data = os.urandom(CHUNK)  # zeros would all be one page of memory, and flatter
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)


def receive(sock: socket.socket) -> tuple[int, float]:
    """Bytes, and the seconds from the first of them to the FIN."""
    buffer = bytearray(CHUNK)
    total = sock.recv_into(buffer)
    began = time.monotonic()
    while got := sock.recv_into(buffer):
        total += got
    return total, time.monotonic() - began


def main() -> int:
    """Take the part that the command line says. 1 if the other end, or the reader, is gone: it was told to stop."""
    with socket.socket(fileno=int(sys.argv[2])) as sock:
        try:
            if sys.argv[1] == "send":
                send(sock, float(sys.argv[3]))
            else:
                total, seconds = receive(sock)
                # Not print: what it cannot write it tries again at the interpreter's end, and complains there.
                os.write(sys.stdout.fileno(), f"{total} {seconds}\n".encode())
        except OSError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
