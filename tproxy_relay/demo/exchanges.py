"""What client and server do with each other in the demo, and what each of them saw of it.

The same exchange runs directly and through the relay; nothing here knows which. Both ends are sockets of
this process, each in the network namespace of its host.
"""

import contextlib
import hashlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Generic, TypeVar

from tproxy_relay.lab import Host, Lab
from tproxy_relay.net import linux, sockets
from tproxy_relay.net.endpoint import Endpoint, from_sockaddr

STEP_TIMEOUT = 10.0
"""Seconds that any single step may take before it counts as broken."""
UPLOAD = bytes(range(256)) * 4096
"""What the client sends before it shuts its side: a mebibyte."""
BEFORE_RESET = 100_000
"""Bytes that the server sends before it breaks off."""

T = TypeVar("T")


class Background(Generic[T]):
    """A function in a thread of its own. A daemon, so that Ctrl-C need not wait for its socket's timeout."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._results: list[T] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run, args=(function,), name="demo-peer", daemon=True)
        self._thread.start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._results.append(function())
        except Exception as error:  # for the thread that asks for the result
            self._errors.append(error)

    def result(self) -> T:
        """What it returned; what it raised is raised here."""
        self._thread.join(2 * STEP_TIMEOUT)
        if self._errors:
            raise self._errors[0]
        if not self._results:
            raise TimeoutError("the other side of the exchange hangs")
        return self._results[0]


@dataclass(frozen=True)
class Conversation:
    """A connection from the client to the server, both ends of it."""

    client: socket.socket
    server: socket.socket
    name: Endpoint
    """The client's own address."""
    asked_for: Endpoint
    """Whom the client takes its peer for."""
    seen: Endpoint
    """Whom the server takes its peer for."""


@contextlib.contextmanager
def conversation(lab: Lab, port: int, family: int = socket.AF_INET) -> Iterator[Conversation]:
    """Connect the client to a listener of the server; both sockets are closed afterwards."""
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(lab.server.listen(port, family))
        listener.settimeout(STEP_TIMEOUT)
        client = opened.enter_context(lab.client.connect(lab.server.address(family), port, STEP_TIMEOUT))
        server, seen = listener.accept()
        opened.enter_context(server)
        server.settimeout(STEP_TIMEOUT)
        name, peer = from_sockaddr(client.getsockname()), from_sockaddr(client.getpeername())
        yield Conversation(client, server, name, peer, from_sockaddr(seen))


@dataclass(frozen=True)
class Answer:
    """The answer to an HTTP request, and who saw whom."""

    name: Endpoint
    asked_for: Endpoint
    status: int
    seen: Endpoint
    """Whom the server says it saw."""


class WebServer:
    """Python's own http.server on the server host, for both families; its answer says whom it sees."""

    def __init__(self, host: Host, port: int) -> None:
        self._servers = [_http_server(host, port, family) for family in (socket.AF_INET, socket.AF_INET6)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), name="demo-http", daemon=True).start()

    def close(self) -> None:
        """Stop serving and close the listeners."""
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _VisitorAddress(BaseHTTPRequestHandler):
    timeout = STEP_TIMEOUT

    def do_GET(self) -> None:
        """Answer with the address and port that the visitor came from, as JSON."""
        visitor = from_sockaddr(self.client_address)
        body = json.dumps({"hello": visitor.host, "port": visitor.port}).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: standard error belongs to the demo."""


def _http_server(host: Host, port: int, family: int) -> HTTPServer:
    server = HTTPServer(("", port), _VisitorAddress, bind_and_activate=False)
    server.socket.close()  # that one was made on this machine
    server.socket = host.listen(port, family)
    return server


def get(lab: Lab, port: int, family: int) -> Answer:
    """One HTTP request from the client to the server's own address."""
    address = lab.server.address(family)
    with lab.client.connect(address, port, STEP_TIMEOUT) as sock:
        name, peer = from_sockaddr(sock.getsockname()), from_sockaddr(sock.getpeername())
        request = http.client.HTTPConnection(address, port)
        request.sock = sock
        request.request("GET", "/", headers={"Connection": "close"})
        with request.getresponse() as response:
            said = json.loads(response.read())
    return Answer(name, peer, response.status, Endpoint(said["hello"], said["port"]))


def half_close(talk: Conversation) -> tuple[str, str]:
    """The client sends UPLOAD, shuts its side, and reads; the server answers only after the end of the data.

    Returns the server's answer, which is the number and SHA-256 of the bytes it got, and how it ended.
    """
    server = Background(lambda: _digest_then_answer(talk.server))
    talk.client.sendall(UPLOAD)
    talk.client.shutdown(socket.SHUT_WR)
    answer, ending = read_to_end(talk.client)
    server.result()
    return answer.decode(), ending


def digest(data: bytes) -> str:
    """What the server says of data that it got."""
    return f"{len(data):,} bytes, SHA-256 {hashlib.sha256(data).hexdigest()}"


def break_off(talk: Conversation) -> tuple[int, str]:
    """The server sends BEFORE_RESET bytes and resets; how many the client got, and what after them."""
    server = Background(lambda: _send_then_reset(talk.server))
    got, ending = read_to_end(talk.client)
    server.result()
    return len(got), ending


def read_to_end(sock: socket.socket) -> tuple[bytes, str]:
    """All that comes, and how it ends: `EOF` or `ECONNRESET`."""
    got = bytearray()
    try:
        while data := sock.recv(65536):
            got += data
    except ConnectionResetError:
        return bytes(got), "ECONNRESET"
    return bytes(got), "EOF"


def _digest_then_answer(sock: socket.socket) -> None:
    data, ending = read_to_end(sock)
    if ending == "EOF":
        sock.sendall(digest(data).encode())
    sock.close()


def _send_then_reset(sock: socket.socket) -> None:
    sock.sendall(bytes(BEFORE_RESET))
    deadline = time.monotonic() + STEP_TIMEOUT
    # What is still in the send queue would be thrown away by the reset, relay or no relay.
    while sockets.unacknowledged(sock) and time.monotonic() < deadline:
        time.sleep(0.001)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linux.LINGER.pack(1, 0))
    sock.close()
