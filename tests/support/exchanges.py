"""Conversations between a client and a server, and what each of them saw of how the other ended.

Each is played once over a direct connection and once through the relay; both must look the same from either
end. Both ends are real sockets, each worked by a thread of its own. What an end saw is a list of words and
figures that do not depend on timing: how many bytes, their hash, and then EOF or the name of the error.
"""

import array
import errno
import fcntl
import hashlib
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tproxy_relay.lab import Host, Lab

PATIENCE = 15.0
"""Seconds after which an end that still waits has failed."""

Saw = list[object]
End = Callable[[socket.socket], Saw]


@dataclass(frozen=True)
class Exchange:
    """A conversation; `client_buffer` is the client's SO_RCVBUF, for clients that are slow to read."""

    name: str
    client: End
    server: End
    outcome: str = "completed"
    client_buffer: int = 0
    server_buffer: int = 0


class Ends:
    """A client and a server that are connected, and the listener between them."""

    def __init__(self, lab: Lab, family: int, port: int, exchange: Exchange | None = None) -> None:
        self.listener = lab.server.listen(port, family)
        self.client = lab.client.socket(family)
        if exchange and exchange.server_buffer:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, exchange.server_buffer)
        if exchange and exchange.client_buffer:
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, exchange.client_buffer)
        self.client.settimeout(5)
        self.client.connect((lab.server.address(family), port))
        self.name = self.client.getsockname()
        self.listener.settimeout(5)
        self.server, self.seen = self.listener.accept()

    def close(self) -> None:
        for sock in (self.client, self.server, self.listener):
            sock.close()


def see_reset(host: Host, address: str, port: int) -> tuple[socket.socket, float]:
    """Connect and be reset, at once or at the first read. The socket, still bound, and the seconds it took.

    A reset that is quick enough meets connect() itself, before it has told of the handshake.
    """
    sock = host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.settimeout(PATIENCE)
    sock.bind(("::" if ":" in address else "0.0.0.0", 0))
    began = time.monotonic()
    try:
        sock.connect((address, port))
        got = sock.recv(1)
    except ConnectionResetError:
        return sock, time.monotonic() - began
    raise AssertionError(f"no reset but {got!r}")


def play(exchange: Exchange, client: socket.socket, server: socket.socket) -> dict[str, Saw]:
    """Let both ends do their part at the same time; what each of them saw."""
    saw: dict[str, Saw] = {}
    ends = {"client": (exchange.client, client), "server": (exchange.server, server)}

    def act(name: str) -> None:
        end, sock = ends[name]
        sock.settimeout(PATIENCE)
        try:
            saw[name] = end(sock)
        except OSError as error:
            saw[name] = ["failed", type(error).__name__, str(error)]

    threads = [threading.Thread(target=act, args=(name,), name=name) for name in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    return saw


# --- what an end can do


def data(size: int, seed: int = 1) -> bytes:
    """Bytes that repeat nowhere near, so that a lost or doubled piece changes the hash."""
    return hashlib.shake_128(seed.to_bytes(4, "big")).digest(size)


def read_to_end(sock: socket.socket, piece: int = 65536, pause: float = 0.0) -> Saw:
    """Everything up to the end: [bytes, hash, how it ended]."""
    got, digest = 0, hashlib.sha256()
    while True:
        try:
            block = sock.recv(piece)
        except TimeoutError:
            return [got, digest.hexdigest(), "nothing more came"]
        except OSError as error:
            return [got, digest.hexdigest(), errno.errorcode[error.errno or 0]]
        if not block:
            return [got, digest.hexdigest(), "EOF"]
        got += len(block)
        digest.update(block)
        if pause:
            select.select([], [], [], pause)  # a reader that takes its time


def read_slowly(sock: socket.socket) -> Saw:
    """In small pieces with a breath between them, so that the sender is long done."""
    return read_to_end(sock, piece=1500, pause=0.002)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer at the end."""
    got = b""
    while len(got) < size and (block := sock.recv(size - len(got))):
        got += block
    return got


def await_acknowledged(sock: socket.socket) -> None:
    """Until the peer's kernel has all that we sent: a reset throws away what is still queued here."""
    left = array.array("i", [1])
    deadline = time.monotonic() + PATIENCE
    while left[0] and time.monotonic() < deadline:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, left)
        select.select([], [], [], 0.001)


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def send_until_broken(sock: socket.socket) -> str:
    """Keep sending into a connection that the peer has closed; `broken` once the kernel has been told."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            sock.sendall(b"x" * 100)
        except (BrokenPipeError, ConnectionResetError):
            return "broken"
        select.select([], [], [], 0.005)
    return "never broken"


def await_hangup(sock: socket.socket) -> str:
    """Without reading or writing: does the kernel say that the connection is dead?"""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    events = poll.poll(PATIENCE * 1000)
    return "hung up" if events and events[0][1] & select.POLLHUP else "no hang-up"


# --- the conversations


def _sends_and_closes(size: int, seed: int = 1) -> End:
    def end(sock: socket.socket) -> Saw:
        sock.sendall(data(size, seed))
        saw = ["sent"]
        sock.shutdown(socket.SHUT_WR)
        saw += read_to_end(sock)
        sock.close()
        return saw

    return end


def _reads_then_answers(size: int) -> End:
    def end(sock: socket.socket) -> Saw:
        saw = read_to_end(sock)
        sock.sendall(data(size, 2))
        sock.close()
        return saw

    return end


def _sends_and_resets(size: int) -> End:
    def end(sock: socket.socket) -> Saw:
        sock.sendall(data(size))
        await_acknowledged(sock)
        reset(sock)
        return ["reset"]

    return end


def _reads_and_closes(read: End) -> End:
    def end(sock: socket.socket) -> Saw:
        saw = read(sock)
        sock.close()
        return saw

    return end


def _closes_with_unread_data(sock: socket.socket) -> Saw:
    select.select([sock], [], [], PATIENCE)  # it is there
    sock.sendall(data(5000))
    await_acknowledged(sock)
    sock.close()
    return ["closed"]


def _sends_a_request_nobody_reads(sock: socket.socket) -> Saw:
    sock.sendall(data(10_000))
    return read_to_end(sock)


def _answers_early_and_closes(sock: socket.socket) -> Saw:
    read_exactly(sock, 10)
    sock.sendall(b"no")
    sock.close()
    return ["closed"]


def _uploads_on_after_the_answer(sock: socket.socket) -> Saw:
    sock.sendall(b"x" * 10)
    return [*read_to_end(sock), send_until_broken(sock)]


def _sends_once_more_and_waits(sock: socket.socket) -> Saw:
    sock.sendall(b"x" * 10)
    saw = read_to_end(sock)
    sock.sendall(b"more")
    return [*saw, await_hangup(sock)]


def _half_closes_and_waits_for_the_reset(sock: socket.socket) -> Saw:
    sock.sendall(data(1000))
    sock.shutdown(socket.SHUT_WR)
    return read_to_end(sock)


def _half_closes_then_vanishes(sock: socket.socket) -> Saw:
    sock.sendall(b"request")
    sock.shutdown(socket.SHUT_WR)
    saw: Saw = [read_exactly(sock, 4)]
    sock.close()  # not listening any more: the next byte is answered with a reset
    return saw


def _answers_somebody_who_vanished(sock: socket.socket) -> Saw:
    saw = read_to_end(sock)
    sock.sendall(b"half")
    return [*saw, send_until_broken(sock)]


def _reads_all_then_resets(sock: socket.socket) -> Saw:
    saw = read_to_end(sock)
    sock.sendall(data(2000, 2))
    await_acknowledged(sock)
    reset(sock)
    return saw


def _speaks_urgently(sock: socket.socket) -> Saw:
    sock.sendall(b"before")
    sock.send(b"!", socket.MSG_OOB)
    sock.sendall(b"after")
    sock.close()
    return ["said"]


def _listens_in_line(sock: socket.socket) -> Saw:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return [read_exactly(sock, 12), *read_to_end(sock)]


def _plays_ping(sock: socket.socket) -> Saw:
    for number in range(500):
        sock.sendall(bytes([number % 251]))
        if read_exactly(sock, 1) != bytes([number % 251]):
            return [f"wrong answer to {number}"]
    sock.close()
    return ["500 answers"]


def _plays_pong(sock: socket.socket) -> Saw:
    got = 0
    while block := sock.recv(64):
        got += len(block)
        sock.sendall(block)
    sock.close()
    return [got]


def _sends_and_reads_at_once(size: int, seed: int) -> End:
    def end(sock: socket.socket) -> Saw:
        sender = threading.Thread(target=lambda: (sock.sendall(data(size, seed)), sock.shutdown(socket.SHUT_WR)))
        sender.start()
        saw = read_to_end(sock)
        sender.join(PATIENCE)
        sock.close()
        return saw

    return end


def _closes(sock: socket.socket) -> Saw:
    sock.close()
    return []


def _resets(sock: socket.socket) -> Saw:
    reset(sock)
    return []


_CRASHING = """
import select, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
sock.sendall(bytes(int(sys.argv[2])))
if int(sys.argv[3]):
    select.select([sock], [], [])
print("sent", flush=True)
select.select([], [], [])
"""


def _is_killed(size: int, *, unread: bool) -> End:
    """The end is a process, and is killed when it has sent so much; with something unread, or not."""

    def end(sock: socket.socket) -> Saw:
        command = [sys.executable, "-c", _CRASHING, str(sock.fileno()), str(size), str(int(unread))]
        sock.setblocking(True)  # of the file description, which the process shares
        with subprocess.Popen(command, pass_fds=[sock.fileno()], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"sent\n"
            await_acknowledged(sock)
            sock.close()
            process.kill()
        return ["killed"]

    return end


def _sends_and_reads(size: int) -> End:
    def end(sock: socket.socket) -> Saw:
        sock.sendall(data(size))
        return read_to_end(sock)

    return end


READER = _reads_and_closes(read_to_end)
SLOW_READER = _reads_and_closes(read_slowly)

EXCHANGES = (
    Exchange("nothing is said, client closes", _closes, READER),
    Exchange("nothing is said, server closes", READER, _closes),
    Exchange("client resets at once", _resets, READER, "client-reset"),
    Exchange("server resets at once", READER, _resets, "upstream-reset"),
    Exchange("server sends and closes", READER, _sends_and_closes(300_000)),
    Exchange("client sends and closes", _sends_and_closes(300_000), READER),
    Exchange("client half-closes, server answers", _sends_and_closes(300_000), _reads_then_answers(300_000)),
    Exchange("server half-closes, client answers", _reads_then_answers(300_000), _sends_and_closes(300_000)),
    Exchange("both send at once", _sends_and_reads_at_once(3_000_000, 3), _sends_and_reads_at_once(2_000_000, 4)),
    Exchange("five hundred single bytes", _plays_ping, _plays_pong),
    Exchange("server sends and resets", READER, _sends_and_resets(100_000), "upstream-reset"),
    Exchange(
        "server sends and resets, slow client",
        SLOW_READER,
        _sends_and_resets(100_000),
        "upstream-reset",
        client_buffer=4096,
    ),
    Exchange("client sends and resets", _sends_and_resets(50_000), READER, "client-reset"),
    Exchange(
        "client sends and resets, slow server",
        _sends_and_resets(50_000),
        SLOW_READER,
        "client-reset",
        server_buffer=4096,
    ),
    Exchange("server sends, slow client", SLOW_READER, _sends_and_closes(400_000), client_buffer=4096),
    Exchange(
        "server closes with the request unread",
        _sends_a_request_nobody_reads,
        _closes_with_unread_data,
        "upstream-reset",
    ),
    Exchange(
        "server answers early, client goes on",
        _uploads_on_after_the_answer,
        _answers_early_and_closes,
        "upstream-reset",
    ),
    Exchange(
        "server answers early, client sends once",
        _sends_once_more_and_waits,
        _answers_early_and_closes,
        "upstream-reset",
    ),
    Exchange(
        "client half-closes, server answers and resets",
        _half_closes_and_waits_for_the_reset,
        _reads_all_then_resets,
        "upstream-reset",
    ),
    Exchange(
        "client half-closes and vanishes", _half_closes_then_vanishes, _answers_somebody_who_vanished, "client-reset"
    ),
    Exchange("the server's process is killed", READER, _is_killed(50_000, unread=False)),
    Exchange(
        "the server's process is killed, a request unread",
        _sends_and_reads(10_000),
        _is_killed(50_000, unread=True),
        "upstream-reset",
    ),
    Exchange("the client's process is killed", _is_killed(50_000, unread=False), READER),
    Exchange(
        "the client's process is killed, an answer unread",
        _is_killed(50_000, unread=True),
        _sends_and_reads(10_000),
        "client-reset",
    ),
    Exchange("an urgent byte to the client", _listens_in_line, _speaks_urgently),
    Exchange("an urgent byte to the server", _speaks_urgently, _listens_in_line),
)
