"""Connections with both ends here: what flows on them, and what each end saw of how it was ended.

The client of a pair sends a message that nobody else sends, the server sends it back, the client rests for a moment
and sends the next one. One thread does that for all of them.
"""

import errno
import heapq
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable

from tproxy_relay.lab import Lab
from tproxy_relay.net.endpoint import from_sockaddr

SIZE = 800
"""Bytes of a message."""
PATIENCE = 10.0
"""Seconds after which what a test waits for has not come."""

_HEAD = struct.Struct(">II")
_IN, _IN_OUT = select.EPOLLIN, select.EPOLLIN | select.EPOLLOUT


class Pair:
    """A connection as its two ends see it. `client_saw` and `server_saw` tell how it ended there: `EOF`, or the name
    of an error; None: it has not."""

    def __init__(self, number: int, client: socket.socket) -> None:
        self.number = number
        self.client = client
        self.server: socket.socket | None = None
        self.name = ""
        """The client's address and port, as the relay writes them."""
        self.rounds = 0
        """Messages that came back."""
        self.began = time.monotonic()
        self.waited: float | None = None
        """Seconds until the first one came back."""
        self.client_saw: str | None = None
        self.server_saw: str | None = None
        self.faults: list[str] = []
        self.back, self.forth = bytearray(), bytearray()

    def __repr__(self) -> str:
        ends = f"client saw {self.client_saw}, server saw {self.server_saw}"
        return f"<{self.name or self.number}: {self.rounds} rounds, {ends} {self.faults or ''}>"

    @property
    def served(self) -> bool:
        """It was led to the server, and back."""
        return self.rounds > 0

    @property
    def flows(self) -> bool:
        """It was served, it goes on, and all its bytes were right."""
        return self.served and self.client_saw is self.server_saw is None and not self.faults

    def message(self) -> bytes:
        """The one that is under way now."""
        return _HEAD.pack(self.number, self.rounds) * (SIZE // _HEAD.size)


class Pairs:
    """All of them: from clients in the client host, to a server in the server host."""

    def __init__(self, lab: Lab, port: int, *, pause: float = 0.4) -> None:
        """`pause` is what a client rests between two messages."""
        self.live_at_server = self.most_at_server = 0
        """Connections that the server has now, and the most that it ever had."""
        self.all: list[Pair] = []
        self._lab, self._port, self._pause = lab, port, pause
        self._changed = threading.Condition()
        self._clients: dict[int, Pair] = {}
        self._servers: dict[int, tuple[socket.socket, Pair | None]] = {}
        self._due: list[tuple[float, int, Pair]] = []
        self._poll = select.epoll()
        self._listener = lab.server.listen(port, backlog=4096)
        self._listener.setblocking(False)
        self._poll.register(self._listener, _IN)
        self._bell, self._stop = socket.socketpair()
        self._poll.register(self._bell, _IN)
        self._thread = threading.Thread(target=self._run, name="pairs", daemon=True)

    def __enter__(self) -> "Pairs":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join(PATIENCE)
        for sock, _pair in self._servers.values():
            sock.close()
        for pair in self.all:
            pair.client.close()
        self._listener.close()
        self._bell.close()
        self._poll.close()

    # --- for the test

    def open(
        self, count: int = 1, *, source: str | None = None, before: Callable[[], None] = lambda: None
    ) -> list[Pair]:
        """So many new clients, all at once; from that address. `before` happens in the moment before they come."""
        socks = [self._lab.client.socket() for _ in range(count)]
        fresh = []
        with self._changed:
            before()
            for sock in socks:
                sock.setblocking(False)
                if source is not None:
                    sock.bind((source, 0))
                pair = Pair(len(self.all), sock)
                code = sock.connect_ex((self._lab.server.ipv4, self._port))
                assert code in (0, errno.EINPROGRESS), os.strerror(code)
                self.all.append(pair)
                fresh.append(pair)
                self._clients[sock.fileno()] = pair
                self._poll.register(sock, _IN_OUT)
        return fresh

    def open_served(self, count: int = 1, *, source: str | None = None) -> list[Pair]:
        """So many new clients that have all been served."""
        fresh = self.open(count, source=source)
        self.wait(lambda: all(pair.flows for pair in fresh), f"{count} clients are served")
        return fresh

    def finish(self, pairs: Iterable[Pair]) -> None:
        """The clients say goodbye; done when the server has, and the clients know."""
        leaving = list(pairs)
        with self._changed:
            for pair in leaving:
                if pair.client_saw is None:
                    pair.client.shutdown(socket.SHUT_WR)
        self.wait(lambda: all(pair.client_saw for pair in leaving), "goodbyes")
        wrong = [pair for pair in leaving if pair.client_saw != "EOF"]
        assert not wrong, f"no clean end: {wrong[:5]}"

    def wait(self, come: Callable[[], bool], what: str, patience: float = PATIENCE) -> float:
        """Until something has happened to the pairs. The seconds that it took."""
        began = time.monotonic()
        with self._changed:
            done = self._changed.wait_for(come, patience)
            assert done, f"not within {patience:g} s: {what}; {self.summary()}"
        return time.monotonic() - began

    def go_on(self, pairs: Iterable[Pair], rounds: int = 2) -> None:
        """Each of them exchanges so many more messages, and the bytes are right."""
        ours = list(pairs)
        goals = {pair.number: pair.rounds + rounds for pair in ours}
        self.wait(lambda: all(p.rounds >= goals[p.number] or not p.flows for p in ours), f"{rounds} more rounds")
        stuck = [pair for pair in ours if not pair.flows]
        assert not stuck, f"{len(stuck)} of {len(ours)} do not go on: {stuck[:5]}"

    def all_reset(self, pairs: Iterable[Pair], patience: float = PATIENCE) -> float:
        """Both ends of each of them see a reset, and neither an EOF. The seconds until the last one."""
        ours = list(pairs)
        took = self.wait(lambda: all(p.client_saw and p.server_saw for p in ours), "their end", patience)
        wrong = [pair for pair in ours if (pair.client_saw, pair.server_saw) != ("ECONNRESET", "ECONNRESET")]
        assert not wrong, f"{len(wrong)} of {len(ours)} saw something else than a reset: {wrong[:5]}"
        return took

    def summary(self) -> str:
        """For those who wonder."""
        flowing = sum(pair.flows for pair in self.all)
        others = [pair for pair in self.all if not pair.flows]
        return f"{flowing} of {len(self.all)} flow; {self.live_at_server} at the server; others: {others[:5]}"

    # --- the thread

    def _run(self) -> None:
        while True:
            events = self._poll.poll(self._patience())
            with self._changed:
                # New connections last: what has ended before they came is known by then.
                for fd, _event in sorted(events, key=lambda event: event[0] == self._listener.fileno()):
                    if fd == self._bell.fileno():
                        return
                    if fd in self._clients:
                        self._client_step(self._clients[fd])
                    elif fd in self._servers:
                        self._server_step(*self._servers[fd])
                    elif fd == self._listener.fileno():
                        self._accept()
                self._send_due()
                self._changed.notify_all()

    def _patience(self) -> float:
        with self._changed:
            # Others may open clients at any time; those are heard of by the epoll.
            return max(0.0, self._due[0][0] - time.monotonic()) if self._due else 1.0

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            _, _, pair = heapq.heappop(self._due)
            if pair.client_saw is None:
                self._send(pair)

    def _send(self, pair: Pair) -> None:
        try:
            pair.client.send(pair.message())
        except BrokenPipeError:
            pass  # it has said goodbye
        except OSError as error:
            self._client_ended(pair, error)

    # --- the client's end

    def _client_step(self, pair: Pair) -> None:
        try:
            if not pair.name:
                self._connected(pair)
            block = pair.client.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._client_ended(pair, error)
            return
        pair.back += block
        if not block:
            self._client_ended(pair, None)
        elif len(pair.back) >= SIZE:
            self._came_back(pair)

    def _connected(self, pair: Pair) -> None:
        try:
            pair.client.getpeername()
        except OSError:  # asked first: a reset may come between the two questions
            if code := pair.client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code)) from None
            raise
        pair.name = str(from_sockaddr(pair.client.getsockname()))
        self._poll.modify(pair.client, _IN)
        self._send(pair)

    def _came_back(self, pair: Pair) -> None:
        if pair.back != pair.message():
            pair.faults.append(f"in round {pair.rounds} other bytes came back")
        pair.back.clear()
        pair.rounds += 1
        if pair.waited is None:
            pair.waited = time.monotonic() - pair.began
        heapq.heappush(self._due, (time.monotonic() + self._pause, pair.number, pair))

    def _client_ended(self, pair: Pair, error: OSError | None) -> None:
        if pair.client_saw is not None:
            return
        pair.client_saw = _name(error)
        self._poll.unregister(pair.client)
        del self._clients[pair.client.fileno()]
        pair.client.close()

    # --- the server's end

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        self._poll.register(sock, _IN)
        self._servers[sock.fileno()] = (sock, None)
        self.live_at_server += 1
        self.most_at_server = max(self.most_at_server, self.live_at_server)

    def _server_step(self, sock: socket.socket, pair: Pair | None) -> None:
        try:
            block = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            self._server_ended(sock, pair, error)
            return
        if not block:
            self._server_ended(sock, pair, None)
            return
        if pair is None:
            # The relay has at least a whole head to pass on: it was sent at once.
            pair = self.all[_HEAD.unpack_from(block)[0]]
            pair.server = sock
            self._servers[sock.fileno()] = (sock, pair)
        pair.forth += block
        if len(pair.forth) >= SIZE:
            self._give_back(sock, pair)

    def _give_back(self, sock: socket.socket, pair: Pair) -> None:
        if pair.forth != pair.message():
            pair.faults.append(f"in round {pair.rounds} other bytes came to the server")
        try:
            sock.send(pair.forth)
        except OSError as error:
            self._server_ended(sock, pair, error)
        pair.forth.clear()

    def _server_ended(self, sock: socket.socket, pair: Pair | None, error: OSError | None) -> None:
        if pair is not None:
            pair.server_saw = _name(error)
        self._poll.unregister(sock)
        del self._servers[sock.fileno()]
        sock.close()
        self.live_at_server -= 1


def _name(error: OSError | None) -> str:
    return "EOF" if error is None else errno.errorcode[error.errno or 0]


class Rhythm:
    """Clients that come one after the other, `interval` seconds between them, whatever becomes of those before."""

    def __init__(self, pairs: Pairs, interval: float) -> None:
        self.opened: list[Pair] = []
        self._pairs, self._interval = pairs, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rhythm", daemon=True)

    def __enter__(self) -> "Rhythm":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)

    def _run(self) -> None:
        began = time.monotonic()
        for number in itertools.count(1):
            self.opened += self._pairs.open()
            if self._stop.wait(max(0.0, began + number * self._interval - time.monotonic())):
                return
