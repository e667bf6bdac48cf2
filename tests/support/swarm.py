"""Thousands of clients and their echo server, each in a process of its own in a host of the lab.

Run as a script it is that server or those clients, with an interpreter and descriptors of their own:

    swarm.py serve ADDRESS PORT                   until its input ends
    swarm.py hold ADDRESS PORT                    obeys `open COUNT`, `echo SIZE` and `close` on its input
    swarm.py churn ADDRESS PORT COUNT SIZE        one connection after the other, then ends

Each answers with JSON lines: how many connections did all of it, and what became of the others. The lower
half of the file is what tests import.
"""

import collections
import contextlib
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, TYPE_CHECKING, Any

from echoing import BLOCK, echo_some

if TYPE_CHECKING:
    from tproxy_relay.lab import Host

PATIENCE = 60.0
"""Seconds for one command over all connections."""

Answer = dict[str, Any]


def main() -> None:
    """The script."""
    role, address, port, *rest = sys.argv[1:]
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if role == "serve":
        serve(address, int(port))
    elif role == "hold":
        hold(address, int(port))
    else:
        say(churn(address, int(port), *map(int, rest)))


def say(answer: Answer) -> None:
    """One line for whoever started us."""
    print(json.dumps(answer), flush=True)


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


# --- the server


def serve(address: str, port: int) -> None:
    """Echo. What a client does not read is not read from it."""
    poll = select.epoll()
    listener = socket.create_server((address, port), family=family(address), backlog=4096)
    listener.setblocking(False)
    poll.register(listener, select.EPOLLIN)
    poll.register(sys.stdin, select.EPOLLIN)
    socks: dict[int, tuple[socket.socket, bytearray]] = {}
    say({"listening": port})
    while True:
        for fd, _ in poll.poll():
            if fd == sys.stdin.fileno():
                return
            if fd == listener.fileno():
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    poll.register(sock, select.EPOLLIN)
                    socks[sock.fileno()] = (sock, bytearray())
            elif not echo_some(poll, *socks[fd]):
                socks.pop(fd)[0].close()


# --- clients that stay


class Client:
    """One connection: what it still has to send, and what it wants back."""

    def __init__(self, address: str, port: int) -> None:
        self.sock = socket.socket(family(address))
        self.sock.setblocking(False)
        self.sock.connect_ex((address, port))
        self.unsent = memoryview(b"")
        self.asked = b""
        self.got = bytearray()

    def connected(self) -> bool:
        """Called when writable."""
        if code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        return True

    def ask(self, size: int) -> None:
        self.asked = os.urandom(size)
        self.unsent = memoryview(self.asked)
        self.got.clear()

    def served(self) -> bool:
        """Called when there is something to do; True with the whole echo here. A wrong echo is a fault."""
        with contextlib.suppress(BlockingIOError):
            if self.unsent:
                self.unsent = self.unsent[self.sock.send(self.unsent) :]
        with contextlib.suppress(BlockingIOError):
            block = self.sock.recv(BLOCK)
            if not block:
                raise EOFError("the server left")
            self.got += block
        if len(self.got) < len(self.asked):
            return False
        if self.got != self.asked:
            raise ValueError("a wrong echo")
        return True

    def ended(self) -> bool:
        """Called when readable, after our FIN: only the server's FIN is right."""
        if self.sock.recv(BLOCK):
            raise ValueError("bytes after the end")
        return True


def hold(address: str, port: int) -> None:
    """Obey until the input ends."""
    clients: list[Client] = []
    for line in sys.stdin:
        verb, *number = line.split()
        if verb == "open":
            clients = [Client(address, port) for _ in range(int(number[0]))]
            say(each(clients, select.EPOLLOUT, Client.connected))
        elif verb == "echo":
            for client in clients:
                client.ask(int(number[0]))
            say(each(clients, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET, Client.served))
        else:
            for client in clients:
                with contextlib.suppress(OSError):
                    client.sock.shutdown(socket.SHUT_WR)
            say(each(clients, select.EPOLLIN, Client.ended))
            for client in clients:
                client.sock.close()


def each(clients: list[Client], events: int, step: Callable[[Client], bool]) -> Answer:
    """Call `step` for every client when its socket is ready, until it says True or raises."""
    began = time.monotonic()
    errors: collections.Counter[str] = collections.Counter()
    waiting = {client.sock.fileno(): client for client in clients}
    poll = select.epoll()
    for fd in waiting:
        poll.register(fd, events)
    while waiting and (left := began + PATIENCE - time.monotonic()) > 0:
        for fd, _ in poll.poll(left):
            try:
                over = step(waiting[fd])
            except (OSError, EOFError, ValueError) as error:
                errors[repr(error)] += 1
                over = True
            if over:
                poll.unregister(fd)
                del waiting[fd]
            elif events & select.EPOLLET:
                poll.modify(fd, events)  # which tells again what is ready
    poll.close()
    if waiting:
        errors["nothing more came"] = len(waiting)
    done = len(clients) - errors.total()
    return {"done": done, "errors": errors, "seconds": round(time.monotonic() - began, 3)}


# --- clients that come and go


def churn(address: str, port: int, count: int, size: int) -> Answer:
    """Connect, ask, be served, say goodbye, wait for the server's goodbye; so often."""
    began = time.monotonic()
    errors: collections.Counter[str] = collections.Counter()
    asked = os.urandom(size)
    for _ in range(count):
        try:
            with socket.create_connection((address, port), PATIENCE) as sock:
                visit(sock, asked)
        except (OSError, EOFError, ValueError) as error:
            errors[repr(error)] += 1
    done = count - errors.total()
    return {"done": done, "errors": errors, "seconds": round(time.monotonic() - began, 3)}


def visit(sock: socket.socket, asked: bytes) -> None:
    sock.sendall(asked)
    got = b""
    while len(got) < len(asked):  # MSG_WAITALL does not wait on a socket with a timeout
        block = sock.recv(len(asked) - len(got))
        if not block:
            raise EOFError("the server left")
        got += block
    if got != asked:
        raise ValueError("a wrong echo")
    sock.shutdown(socket.SHUT_WR)
    if sock.recv(1):
        raise ValueError("bytes after the end")


# --- for the tests


class Script:
    """One of the above, running in a host."""

    def __init__(self, host: "Host", role: str, address: str, port: int, *numbers: int) -> None:
        # No site-packages, nothing of the user's environment, so that it starts fast; -I would hide its own folder.
        command = [sys.executable, "-E", "-s", "-S", __file__, role, address, str(port), *map(str, numbers)]
        self._process = host.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        """Its input ends; so does it, or it is killed."""
        self._pipe(self._process.stdin).close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pipe(self._process.stdout).close()

    def ask(self, command: str) -> Answer:
        """Give it a command and wait for the answer."""
        self._pipe(self._process.stdin).write(f"{command}\n".encode())
        self._pipe(self._process.stdin).flush()
        return self.answer()

    def answer(self) -> Answer:
        """Its next line."""
        line = self._pipe(self._process.stdout).readline()
        assert line, f"{self._process.args} ended without an answer"
        answer: Answer = json.loads(line)
        return answer

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe


@contextlib.contextmanager
def echo_server(host: "Host", port: int, kind: int = socket.AF_INET) -> Iterator[None]:
    """An echo server in that host, listening."""
    with Script(host, "serve", host.address(kind), port) as server:
        server.answer()
        yield


def come_and_go(host: "Host", address: str, port: int, count: int, *, size: int = 64, processes: int = 8) -> Answer:
    """So many connections in all from so many processes at once; the sum of their answers."""
    done, errors, began = 0, collections.Counter[str](), time.monotonic()
    with contextlib.ExitStack() as stack:
        scripts = [
            stack.enter_context(Script(host, "churn", address, port, count // processes, size))
            for _ in range(processes)
        ]
        for answer in [script.answer() for script in scripts]:
            done += answer["done"]
            errors.update(answer["errors"])
    return {"done": done, "errors": dict(errors), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    main()
