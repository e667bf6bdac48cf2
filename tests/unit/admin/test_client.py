"""Asking a relay: what its answers become, and which relay is asked."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from deadlines import PATIENCE

from tproxy_relay.admin import address, client
from tproxy_relay.admin.client import Client, NoRelayError
from tproxy_relay.errors import CapabilityMissingError, SystemRefusedError
from tproxy_relay.settings import HostPort, Settings

# Relays are found by their names in this network, and other tests have some, too.
pytestmark = pytest.mark.usefixtures("network")


@contextmanager
def answering(answer: bytes) -> Iterator[list[bytes]]:
    """This process in the place of a relay; the first lines of the requests."""
    asked: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        peer, _ = sock.accept()
        with peer:
            asked.append(peer.recv(4096).partition(b"\r\n")[0])
            peer.sendall(answer)

    with closing(address.own()) as own:
        own.sock.settimeout(PATIENCE)
        thread = threading.Thread(target=serve, args=(own.sock,))
        thread.start()
        yield asked
        thread.join(PATIENCE)


def response(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


def test_a_document() -> None:
    with answering(response("200 OK", b'{"a":1}\n')) as asked:
        assert Client(os.getpid()).get("/sessions", {"client": "10.0.0.0/8"}) == {"a": 1}
    assert asked == [b"GET /sessions?client=10.0.0.0%2F8 HTTP/1.1"]


def test_an_abort() -> None:
    with answering(response("200 OK", b'{"aborted":"1-1-1"}\n')) as asked:
        Client(os.getpid()).abort("1-1-1")
    assert asked == [b"DELETE /sessions/1-1-1 HTTP/1.1"]


@pytest.mark.parametrize(
    "answer, error, why",
    [
        (response("403 Forbidden", b"not you\n"), CapabilityMissingError, "says: not you$"),
        (response("404 Not Found", b"nothing\n"), SystemRefusedError, "says: nothing$"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", SystemRefusedError, "does not answer"),
        (b"", SystemRefusedError, "does not answer"),
    ],
)
def test_what_is_no_document(answer: bytes, error: type[Exception], why: str) -> None:
    with answering(answer), pytest.raises(error, match=why):
        Client(os.getpid()).get("/status")


def test_nobody_is_there(tmp_path: object) -> None:
    with pytest.raises(NoRelayError, match="cannot ask the relay at .*: No such file or directory") as caught:
        Client(f"{tmp_path}/admin.sock").get("/status")
    assert caught.value.exit_code == 3
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(NoRelayError, match="Connection refused"):
            Client(HostPort("127.0.0.1", free.getsockname()[1])).get("/status")


def test_the_relay_with_one_of_these_ports_is_found() -> None:
    status = b'{"listeners":[{"name":"127.0.0.1:7"}],"state":"running"}\n'
    with answering(response("200 OK", status)):
        assert client.find(Settings(ports=(7, 9))).where == os.getpid()


def test_or_the_one_that_is_named(tmp_path: object) -> None:
    named = client.find(Settings(ports=(1,), admin=f"{tmp_path}/admin.sock"))
    assert named.where == f"{tmp_path}/admin.sock"
