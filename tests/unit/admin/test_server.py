"""Conversations, with people who know how to behave and with others."""

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from deadlines import PATIENCE, wait_until

from tproxy_relay.admin import address, http, server
from tproxy_relay.admin.http import HttpError, Request
from tproxy_relay.admin.server import Conversation, Server
from tproxy_relay.settings import HostPort

LARGE = b"x" * (8 << 20)


class Desk:
    """A server in a thread, whose answers are about the request; `held` ones are given later."""

    def __init__(self, where: address.Where) -> None:
        self.selector = selectors.DefaultSelector()
        self.held: list[Conversation] = []
        self.admin = address.listen(where)
        self.server = Server(self.selector, self.admin, self._ask)
        self._stop, self._wake = socket.socketpair()
        self.selector.register(self._stop, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="desk")
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self.admin.sock.getsockname()[1])

    def _ask(self, request: Request, to: Conversation) -> None:
        if request.path == "/large":
            to.answer(http.Response(http.HTTPStatus.OK, http.TEXT, LARGE))
        elif request.path == "/held":
            self.held.append(to)
        elif request.path == "/nothing":
            raise HttpError(http.HTTPStatus.NOT_FOUND, "nothing is here")
        else:
            to.answer(http.document({"method": request.method, "path": request.path, "permitted": to.permitted}))

    def _run(self) -> None:
        while True:
            due = self.server.deadline
            for key, _ in self.selector.select(None if due is None else max(0.0, due - time.monotonic())):
                if key.fileobj is self._stop:
                    return
                key.data()
            self.server.tick(time.monotonic())

    def close(self) -> None:
        self._wake.send(b".")
        self._thread.join(PATIENCE)
        self.server.close()
        self.selector.close()
        self._stop.close()
        self._wake.close()

    def dial(self) -> socket.socket:
        where = self.admin.where
        return address.dial(HostPort("127.0.0.1", self.port) if isinstance(where, HostPort) else str(where), PATIENCE)

    def says(self, request: bytes) -> bytes:
        """All of the answer."""
        with self.dial() as sock:
            sock.sendall(request)
            return read_all(sock)

    @property
    def conversations(self) -> int:
        return self.server.debug_state()["conversations"]


def read_all(sock: socket.socket) -> bytes:
    answer = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := sock.recv(1 << 20):
            answer += data
    return bytes(answer)


def get(path: str, method: str = "GET", host: str = "localhost") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


@pytest.fixture(params=["tcp", "unix"])
def desk(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[Desk]:
    made = Desk(HostPort("127.0.0.1", 0) if request.param == "tcp" else f"{tmp_path}/admin.sock")
    yield made
    made.close()


@pytest.fixture
def tcp() -> Iterator[Desk]:
    made = Desk(HostPort("127.0.0.1", 0))
    yield made
    made.close()


def test_a_question_and_its_answer(desk: Desk) -> None:
    answer = desk.says(get("/x"))
    permitted = b"false" if desk.admin.is_tcp else b"true"
    assert answer.endswith(b'{"method":"GET","path":"/x","permitted":' + permitted + b"}\n")
    assert desk.says(get("/x", "HEAD")).endswith(b"\r\n\r\n")
    assert b" 404 Not Found\r\n" in desk.says(get("/nothing"))
    wait_until(lambda: not desk.conversations, "they are over")


def test_it_comes_in_pieces(desk: Desk) -> None:
    with desk.dial() as sock:
        for byte in get("/x"):
            sock.sendall(bytes([byte]))
        assert b" 200 OK\r\n" in read_all(sock)


def test_a_large_answer_waits_for_whoever_takes_it(desk: Desk) -> None:
    with desk.dial() as slow:
        slow.sendall(get("/large"))
        assert desk.says(get("/x")), "others are answered meanwhile"
        assert read_all(slow).endswith(LARGE)


def test_an_answer_may_come_later(desk: Desk) -> None:
    with desk.dial() as sock:
        sock.sendall(get("/held"))
        wait_until(lambda: desk.held, "the question is there")
        (held,) = desk.held
        held.until = 0.0  # it takes too long
        desk.says(get("/x"))
        assert read_all(sock) == b""
        held.answer(http.document({}))  # nobody minds


def test_a_foreign_name(tcp: Desk, tmp_path: object) -> None:
    assert b" 403 Forbidden\r\n" in tcp.says(get("/x", host="evil.example"))
    assert b" 200 OK\r\n" in tcp.says(get("/x", host=f"127.0.0.1:{tcp.port}"))
    unix = Desk(f"{tmp_path}/admin.sock")
    try:
        assert b" 200 OK\r\n" in unix.says(get("/x", host="evil.example")), "no browser comes here"
    finally:
        unix.close()


def test_half_a_request_ends(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_TIMEOUT", 0.3)
    began = time.monotonic()
    with desk.dial() as sock:
        sock.sendall(b"GET / HT")
        assert read_all(sock) == b""
    assert 0.2 < time.monotonic() - began < 5


def test_a_request_without_an_end(desk: Desk) -> None:
    with desk.dial() as sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sent = 0
        while sent < 64 << 20:
            sent += sock.send(b"x" * 65536)
    assert sent < 4 << 20, "what is sent is not read"
    wait_until(lambda: not desk.conversations, "it is over")


def test_who_takes_no_answer_is_left(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "ANSWER_TIMEOUT", 0.3)
    with desk.dial() as sock:
        sock.sendall(get("/large"))
        wait_until(lambda: desk.conversations, "it is there")
        wait_until(lambda: not desk.conversations, "it is over")
        assert len(read_all(sock)) < len(LARGE)


def test_many_at_once_take_turns(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONVERSATIONS", 4)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(desk.dial()) for _ in range(12)]
        wait_until(lambda: desk.conversations == 4, "some are let in")
        assert desk.conversations == 4
        for one in silent[4:]:
            one.sendall(get("/x"))
        for one in silent[:4]:
            one.close()
        for one in silent[4:]:
            assert b" 200 OK\r\n" in read_all(one)


def test_without_a_descriptor_it_waits(tcp: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept() fails with EMFILE for as long as there is none, and epoll tells of it again and again."""
    real, calls = socket.socket.accept, []

    def accept(sock: socket.socket) -> tuple[socket.socket, object]:
        if sock is tcp.admin.sock and len(calls) < 3:
            calls.append(time.monotonic())
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(sock)

    monkeypatch.setattr(socket.socket, "accept", accept)
    monkeypatch.setattr(server, "FULL_PAUSE", 0.2)
    began = time.monotonic()
    assert b" 200 OK\r\n" in tcp.says(get("/x"))
    assert len(calls) == 3 and 0.5 < time.monotonic() - began < 5


def test_who_hangs_up_is_forgotten(desk: Desk) -> None:
    with desk.dial():
        wait_until(lambda: desk.conversations == 1, "it is there")
    wait_until(lambda: not desk.conversations, "it is gone")
