"""A relay of our own shape in Python, and nothing else: no records, limits, timeouts, no supervisor and no guard.

    relay.py PORT PROCESSES

What the interpreter and the kernel take of a connection here is the least that ours can take.
"""

import contextlib
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

IP_TRANSPARENT, IPV6_TRANSPARENT = 19, 75  # linux/in.h, linux/in6.h
MOST = 9500
READY = 64
BUFFER = 4096


def copy(src: socket.socket, dst: socket.socket, left: list[int]) -> None:
    """One direction; whoever leaves last closes."""
    try:
        while data := src.recv(BUFFER):
            dst.sendall(data)
        dst.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (src, dst):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
    left.pop()
    if not left:
        src.close()
        dst.close()


def serve(client: socket.socket, second: ThreadPoolExecutor) -> None:
    """One connection."""
    upstream = socket.socket(client.family, socket.SOCK_STREAM)
    try:
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upstream.connect(client.getsockname())
    except OSError:
        client.close()
        upstream.close()
        return
    left = [1, 2]
    second.submit(copy, upstream, client, left)
    copy(client, upstream, left)


def ready_pool() -> ThreadPoolExecutor:
    """With some threads that wait."""
    pool, gate = ThreadPoolExecutor(MOST), threading.Barrier(READY + 1)
    for _ in range(READY):
        pool.submit(gate.wait)
    gate.wait()
    return pool


def run(listener: socket.socket, processor: int) -> None:
    """One process."""
    os.sched_setaffinity(0, {processor})
    threading.stack_size(256 * 1024)
    first, second = ready_pool(), ready_pool()
    while True:
        client, _ = listener.accept()
        first.submit(serve, client, second)


def end_with_parent(pipe: int) -> None:
    """In a thread: nobody else has the other end."""
    os.read(pipe, 1)
    os._exit(0)


def main() -> None:
    """All of them."""
    port, processes = int(sys.argv[1]), int(sys.argv[2])
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
    listener.setsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1)
    listener.bind(("::", port))
    listener.listen(4096)
    processors = sorted(os.sched_getaffinity(0))
    read_end, write_end = os.pipe()
    for number in range(1, processes):
        if not os.fork():
            os.close(write_end)
            threading.Thread(target=end_with_parent, args=(read_end,), daemon=True).start()
            run(listener, processors[number % len(processors)])
    run(listener, processors[0])


if __name__ == "__main__":
    main()
