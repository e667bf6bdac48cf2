"""Many clients of an echo server at once, each asking for one echo, and what became of each of them."""

import select
import selectors
import socket
import threading
import time

from tproxy_relay.lab import Lab

ASKED = b"ping"


class EchoServer:
    """An echo server in the server host. `asked` counts the requests it has had, over all connections."""

    def __init__(self, lab: Lab, port: int) -> None:
        self.asked = 0
        self._selector = selectors.DefaultSelector()
        self._listener = lab.server.listen(port, backlog=4096)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._bell, self._stop = socket.socketpair()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="echo", daemon=True)
        self._thread.start()

    def __enter__(self) -> "EchoServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join(10)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._bell:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._echo(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self._selector.register(sock, selectors.EVENT_READ)

    def _echo(self, sock: socket.socket) -> None:
        try:
            block = sock.recv(65536)
            self.asked += block.count(ASKED)
            sock.sendall(block)
        except OSError:
            block = b""
        if not block:
            self._selector.unregister(sock)
            sock.close()


class Clients:
    """Clients that have connected and asked. Each is `waiting`, `served`, `reset`, or (a fault) `ended`."""

    def __init__(self, lab: Lab, port: int, count: int) -> None:
        self.waiting: set[socket.socket] = set()
        self.served: set[socket.socket] = set()
        self.reset: set[socket.socket] = set()
        self.ended: set[socket.socket] = set()
        self._poll = select.epoll()
        self._by_fd: dict[int, socket.socket] = {}
        for _ in range(count):
            sock = lab.client.connect(lab.server.ipv4, port)
            sock.setblocking(False)
            self._by_fd[sock.fileno()] = sock
            self.waiting.add(sock)
            self._poll.register(sock.fileno(), select.EPOLLIN)
            try:
                sock.send(ASKED)
            except OSError:
                self._settle(sock)

    def watch(self, seconds: float, *, until_served: int | None = None) -> None:
        """Note what becomes of them for so long, or until so many have been served, or none waits."""
        deadline = time.monotonic() + seconds
        while self.waiting and (until_served is None or len(self.served) < until_served):
            left = deadline - time.monotonic()
            if left <= 0:
                return
            for fd, _ in self._poll.poll(left):
                self._settle(self._by_fd[fd])

    def _settle(self, sock: socket.socket) -> None:
        try:
            answer = sock.recv(100)
        except BlockingIOError:
            return
        except OSError:
            became = self.reset
        else:
            became = self.served if answer == ASKED else self.ended
        self._poll.unregister(sock.fileno())
        self.waiting.discard(sock)
        became.add(sock)

    def close_served(self) -> None:
        """The served ones leave."""
        for sock in self.served:
            self._by_fd.pop(sock.fileno(), None)
            sock.close()

    def close(self) -> None:
        """All leave."""
        for sock in self._by_fd.values():
            sock.close()
        self._poll.close()
