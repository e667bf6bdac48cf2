"""One direction of a bulk transfer, as a process: `bulk.py send SEED BYTES`, `bulk.py receive SEED REST`.

Its standard input is the connected socket. The bytes come from a random pool, in pieces of 1 byte to 256 KiB
(log-uniform), each from another place of the pool; the first thousands are single bytes. The receiver rests
once, early on, for REST seconds. Each prints a JSON object with how many bytes it was and their SHA-256.
Imports nothing but the standard library.
"""

import hashlib
import json
import math
import random
import socket
import sys
import time

POOL = 16 * 1024 * 1024
LARGEST = 256 * 1024
SINGLE_BYTES = 5_000
REST_AFTER = 1_000_000


def main() -> None:
    role, seed, figure = sys.argv[1:]
    sock = socket.socket(fileno=0)
    rng = random.Random(int(seed))
    if role == "send":
        count, digest = send(sock, rng, int(figure))
    else:
        count, digest = receive(sock, rng, float(figure))
    print(json.dumps({"bytes": count, "sha256": digest}))


def send(sock: socket.socket, rng: random.Random, total: int) -> tuple[int, str]:
    """All of it, and then our FIN."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # single bytes are to travel as such
    pool = memoryview(rng.randbytes(POOL))
    digest, sent = hashlib.sha256(), 0
    while sent < total:
        size = min(1 if sent < SINGLE_BYTES else any_size(rng), total - sent)
        start = rng.randrange(POOL - size)
        piece = pool[start : start + size]
        sock.sendall(piece)
        digest.update(piece)
        sent += size
    sock.shutdown(socket.SHUT_WR)
    return sent, digest.hexdigest()


def receive(sock: socket.socket, rng: random.Random, rest: float) -> tuple[int, str]:
    """Until the other end's FIN."""
    buffer = memoryview(bytearray(LARGEST))
    digest, received = hashlib.sha256(), 0
    while count := sock.recv_into(buffer, any_size(rng)):
        digest.update(buffer[:count])
        received += count
        if rest and received > REST_AFTER:
            time.sleep(rest)
            rest = 0
    return received, digest.hexdigest()


def any_size(rng: random.Random) -> int:
    """1 to LARGEST; half of them below 512."""
    return round(math.exp(rng.uniform(0, math.log(LARGEST))))


if __name__ == "__main__":
    main()
