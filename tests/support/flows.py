"""Clients that never rest, and their echo server, each in a process of its own in a host of the lab.

Run as a script:

    flows.py serve FIRST LAST                         echo on these ports, both families, until its input ends
    flows.py streams ADDRESS PORT COUNT SIZE PAUSE    so many connections, each sends SIZE bytes, waits for their echo,
                                                      rests for PAUSE seconds, and so on until its input ends
    flows.py steady ADDRESS PORT RATE                 so many new connections a second, each for one echo, until then

Each line of input is answered with a JSON line: how far it is, and what went wrong. The lower half of the file is
what tests import.
"""

import collections
import contextlib
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from echoing import BLOCK, echo_some

if TYPE_CHECKING:
    from tproxy_relay.lab import Host

PATIENCE = 10.0
"""Seconds for one exchange; then it has failed."""
LAST_TIMEOUT = 20.0
"""Seconds for the connections that are there when the input ends."""
VISIT = 100
"""Bytes of one echo to a steady client."""

Answer = dict[str, Any]


def main() -> None:
    """The script."""
    role, *rest = sys.argv[1:]
    if role == "serve":
        serve(*map(int, rest))
        return
    address, port, *numbers = rest
    party: Party
    if role == "streams":
        party = Streams(address, int(port), int(numbers[0]), int(numbers[1]), float(numbers[2]))
    else:
        party = Steady(address, int(port), float(numbers[0]))
    party.run()


def say(answer: Answer) -> None:
    """One line for whoever started us."""
    print(json.dumps(answer), flush=True)


# --- the server


def serve(first: int, last: int) -> None:
    """Echo. What a client does not read is not read from it."""
    poll = select.epoll()
    poll.register(sys.stdin, select.EPOLLIN)
    listeners = {}
    for port in range(first, last + 1):
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            listener = socket.create_server((address, port), family=family, backlog=4096)
            listener.setblocking(False)
            listeners[listener.fileno()] = listener
            poll.register(listener, select.EPOLLIN)
    socks: dict[int, tuple[socket.socket, bytearray]] = {}
    say({"listening": [first, last]})
    while True:
        for fd, _ in poll.poll():
            if fd == sys.stdin.fileno():
                return
            if fd in listeners:
                with contextlib.suppress(OSError):
                    sock, _ = listeners[fd].accept()
                    sock.setblocking(False)
                    poll.register(sock, select.EPOLLIN)
                    socks[sock.fileno()] = (sock, bytearray())
            elif not echo_some(poll, *socks[fd]):
                socks.pop(fd)[0].close()


# --- one client


class Client:
    """One connection. It connects, asks, is answered, and then rests, or says goodbye."""

    def __init__(self, address: str, port: int) -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.sock.setblocking(False)
        self.began = time.monotonic()
        self.phase = "connect"
        self.rounds = 0
        self.sent, self.back = hashlib.sha256(), hashlib.sha256()
        self._asked = b""
        self._unsent = memoryview(b"")
        self._missing = 0
        self.sock.connect_ex((address, port))

    def ask(self, size: int) -> None:
        """Begin an exchange, as soon as it is connected."""
        self.began = time.monotonic()
        self._asked = os.urandom(size)
        self._unsent, self._missing = memoryview(self._asked), size
        self.sent.update(self._asked)
        if self.phase == "rest":
            self.phase = "exchange"

    def goodbye(self) -> None:
        """Our FIN."""
        self.began = time.monotonic()
        self.phase = "goodbye"
        self.sock.shutdown(socket.SHUT_WR)

    def step(self) -> None:
        """Whatever its socket allows. OSError, EOFError or ValueError if the connection or its bytes are lost."""
        if self.phase == "connect":
            if code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            with contextlib.suppress(OSError):
                self.sock.getpeername()
                self.phase = "exchange"
        with contextlib.suppress(BlockingIOError):
            if self._unsent and self.phase == "exchange":
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
        with contextlib.suppress(BlockingIOError):
            while block := self.sock.recv(BLOCK) if self.phase != "connect" else b"":
                self._take(block)
            if self.phase == "goodbye":
                self.phase = "over"
            elif self.phase != "connect":
                raise EOFError("the server left")

    def _take(self, block: bytes) -> None:
        if len(block) > self._missing:
            raise ValueError("more bytes than were sent")
        place = len(self._asked) - self._missing
        if self._asked[place : place + len(block)] != block:
            raise ValueError("other bytes than were sent")
        self.back.update(block)
        self._missing -= len(block)
        if not self._missing:
            self.rounds += 1
            self.phase = "rest"


class Party:
    """Clients, and the clock that drives them."""

    def __init__(self) -> None:
        self.errors: collections.Counter[str] = collections.Counter()
        self.clients: dict[int, Client] = {}
        self.slowest = 0.0
        self.ending = False
        self.poll = select.epoll()
        self.poll.register(sys.stdin, select.EPOLLIN)

    def run(self) -> None:
        """Until the input has ended, and the last connection."""
        deadline = None
        while not self.ending or self.clients:
            for fd, _ in self.poll.poll(0.002 if self.clients or not self.ending else 0):
                if fd in self.clients:
                    self.attempt(self.clients[fd])
                elif sys.stdin.readline():
                    say(self.answer())
                else:
                    self.poll.unregister(sys.stdin)
                    self.ending = True
                    deadline = time.monotonic() + LAST_TIMEOUT
            self.keep_time(time.monotonic())
            if deadline is not None and time.monotonic() > deadline:
                self.errors["still there at the end"] += len(self.clients)
                break
        say(self.answer())

    def enter(self, client: Client) -> None:
        """One more."""
        self.clients[client.sock.fileno()] = client
        self.poll.register(client.sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def attempt(self, client: Client) -> None:
        """Let it do what it can."""
        try:
            client.step()
            if client.phase == "rest":
                self.slowest = max(self.slowest, time.monotonic() - client.began)
                self.has_been_served(client)
        except (OSError, EOFError, ValueError) as error:
            self.lose(client, f"{type(error).__name__} in {client.phase}")
        else:
            if client.phase == "over":
                self.forget(client)

    def lose(self, client: Client, why: str) -> None:
        """A fault."""
        self.errors[why] += 1
        self.forget(client)

    def forget(self, client: Client) -> None:
        """It is over."""
        self.clients.pop(client.sock.fileno())
        self.poll.unregister(client.sock)
        client.sock.close()

    def lose_late_ones(self, now: float) -> None:
        """An answer that has not come for so long will not come."""
        for client in list(self.clients.values()):
            if client.phase != "rest" and now - client.began > PATIENCE:
                self.lose(client, f"timeout in {client.phase}")

    def has_been_served(self, client: Client) -> None:
        """It has its echo."""
        raise NotImplementedError

    def keep_time(self, now: float) -> None:
        """Whatever is due."""
        raise NotImplementedError

    def answer(self) -> Answer:
        """How far it is."""
        raise NotImplementedError


class Streams(Party):
    """Connections that stay, with data flowing on each."""

    def __init__(self, address: str, port: int, count: int, size: int, pause: float) -> None:
        super().__init__()
        self._size, self._pause = size, pause
        self._rests: collections.deque[tuple[float, Client]] = collections.deque()
        self._all = [Client(address, port) for _ in range(count)]
        for client in self._all:
            client.ask(size)
            self.enter(client)

    def has_been_served(self, client: Client) -> None:
        self._rests.append((time.monotonic() + self._pause, client))
        client.phase = "pause"
        client.began = time.monotonic() + self._pause

    def keep_time(self, now: float) -> None:
        self.lose_late_ones(now)
        while self._rests and (self._rests[0][0] <= now or self.ending):
            _, client = self._rests.popleft()
            if self.clients.get(client.sock.fileno()) is not client:
                continue  # it was lost meanwhile
            client.phase = "rest"
            if self.ending:
                client.goodbye()
            else:
                client.ask(self._size)
            self.attempt(client)

    def answer(self) -> Answer:
        digests = [(client.sent.hexdigest(), client.back.hexdigest()) for client in self._all]
        return {
            "rounds": min(client.rounds for client in self._all),
            "whole": sum(sent == back for sent, back in digests),
            "errors": self.errors,
            "slowest": round(self.slowest, 3),
        }


class Steady(Party):
    """Connections that come at a constant rate, whatever becomes of those before."""

    def __init__(self, address: str, port: int, rate: float) -> None:
        super().__init__()
        self._address, self._port, self._interval = address, port, 1 / rate
        self._next = time.monotonic()
        self._begun = self._served = 0

    def has_been_served(self, client: Client) -> None:
        self._served += 1
        client.goodbye()
        client.step()

    def keep_time(self, now: float) -> None:
        self.lose_late_ones(now)
        while self._next <= now and not self.ending:
            self._next += self._interval
            self._begun += 1
            client = Client(self._address, self._port)
            client.ask(VISIT)
            self.enter(client)

    def answer(self) -> Answer:
        slowest = round(self.slowest, 3)
        return {"begun": self._begun, "served": self._served, "errors": self.errors, "slowest": slowest}


# --- for the tests


class Flow:
    """One of the above, running in a host."""

    def __init__(self, host: "Host", *arguments: object) -> None:
        # No site-packages, nothing of the user's environment, so that it starts fast; -I would hide its own folder.
        command = [sys.executable, "-E", "-s", "-S", __file__, *map(str, arguments)]
        self._process = host.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._ended = False

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: object) -> None:
        """Killed, if nobody has waited for its end."""
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()
        self._process.kill()
        self._process.wait()

    def ask(self) -> Answer:
        """How far it is."""
        _pipe(self._process.stdin).write(b"\n")
        _pipe(self._process.stdin).flush()
        return self.read()

    def read(self) -> Answer:
        """Its next line."""
        line = _pipe(self._process.stdout).readline()
        assert line, f"{self._process.args} ended without an answer"
        answer: Answer = json.loads(line)
        return answer

    def go_on(self, when: str) -> None:
        """Every stream makes progress, and no connection was lost."""
        before = now = self.ask()
        deadline = time.monotonic() + PATIENCE
        while now.get("rounds", now.get("served")) < before.get("rounds", before.get("served")) + 3:
            assert not now["errors"], f"{when}: {now}"
            assert time.monotonic() < deadline, f"{when}: nothing flows any more: {now}"
            select.select([], [], [], 0.01)
            now = self.ask()
        assert not now["errors"], f"{when}: {now}"

    def finish(self) -> Answer:
        """Have it end, in good order; its last words."""
        _pipe(self._process.stdin).close()
        return self.read()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


@contextlib.contextmanager
def echo_server(host: "Host", first: int, last: int) -> Iterator[None]:
    """An echo server in that host, listening on these ports."""
    with Flow(host, "serve", first, last) as server:
        server.read()
        yield


def streams(host: "Host", address: str, port: int, count: int = 1, *, size: int = 4000, pause: float = 0.02) -> Flow:
    """Connections that stay."""
    return Flow(host, "streams", address, port, count, size, pause)


def steady(host: "Host", address: str, port: int, rate: float = 200) -> Flow:
    """Connections that come and go."""
    return Flow(host, "steady", address, port, rate)


if __name__ == "__main__":
    main()
