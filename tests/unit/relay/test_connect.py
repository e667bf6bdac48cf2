"""The way to the server: as whom, and the outcome of each error."""

import errno
import logging
import os
import socket

import loopback
import pytest
from desks import DeskMaker, assert_refused, target_of
from lines import Lines

from tproxy_relay.net import endpoint, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import PathTuning
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import connect, policy
from tproxy_relay.relay.connect import SocketTuning

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


@pytest.mark.parametrize(
    ("number", "outcome"),
    [
        (errno.ECONNREFUSED, "connect-refused"),
        (errno.ECONNRESET, "connect-refused"),
        (errno.ETIMEDOUT, "connect-timeout"),
        (errno.ENETUNREACH, "connect-unreachable"),
        (errno.EHOSTUNREACH, "connect-unreachable"),
        (errno.ENETDOWN, "connect-unreachable"),
        (errno.EACCES, "connect-unreachable"),
        (errno.EPERM, "connect-unreachable"),
        (errno.EADDRNOTAVAIL, "no-local-port"),
        (errno.EADDRINUSE, "no-local-port"),
        (errno.EMFILE, "over-limit"),
        (errno.ENOBUFS, "over-limit"),
        (errno.ENOMEM, "over-limit"),
        (errno.EBADF, "internal-error"),
    ],
)
def test_every_error_of_connect_has_its_outcome(
    desks: DeskMaker, lines: Lines, monkeypatch: pytest.MonkeyPatch, number: int, outcome: str
) -> None:
    def fail(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sockets, "connect", fail)
    desk = desks(Endpoint("127.0.0.1", 9))
    with desk.dial() as client:
        desk.start()
        line = assert_refused(desk, client, lines, outcome, logging.WARNING)
    assert line["error"] == os.strerror(number)


def test_when_the_clients_port_is_taken_its_address_will_do(
    desks: DeskMaker, server: socket.socket, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Endpoint] = []

    def bind(_sock: socket.socket, source: Endpoint) -> None:
        asked.append(source)
        if source.port:
            raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(policy, "sources", lambda *_args: (policy.FULL, policy.ADDRESS))
    monkeypatch.setattr(sockets, "bind_foreign", bind)
    desk = desks(target_of(server))
    with desk.dial() as client:
        me = endpoint.from_sockaddr(client.getsockname())
        desk.start()
        server.accept()[0].close()
    assert lines.closed()[0]["source"] == "address"
    assert asked == [me, me.with_port(0)]
    desk.await_end()


@pytest.mark.parametrize(
    ("number", "tries"),
    [(errno.EADDRNOTAVAIL, 2), (errno.EADDRINUSE, 2), (errno.ECONNREFUSED, 1), (errno.ETIMEDOUT, 1)],
)
def test_another_source_is_tried_only_for_want_of_a_port(
    desks: DeskMaker, lines: Lines, monkeypatch: pytest.MonkeyPatch, number: int, tries: int
) -> None:
    asked: list[Endpoint] = []

    def fail(*_args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(policy, "sources", lambda *_args: (policy.FULL, policy.ADDRESS))
    monkeypatch.setattr(sockets, "bind_foreign", lambda _sock, source: asked.append(source))
    monkeypatch.setattr(sockets, "connect", fail)
    desk = desks(Endpoint("127.0.0.1", 9))
    with desk.dial():
        desk.start()
        lines.closed()
    assert len(asked) == tries
    desk.await_end()


def test_a_path_that_cannot_be_set_leaves_no_socket() -> None:
    plain, unheard_of = PathTuning(None, 0, 0), PathTuning("no-such-thing", 0, 0)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        connect.open_socket(socket.AF_INET, SocketTuning(loopback.UNTUNED, plain, unheard_of))
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_order_to_end_counts_more_than_how_the_connect_failed() -> None:
    refusal = connect.refusal(ConnectionAbortedError(errno.ECONNABORTED, "told to end"), Outcome.DRAINED)
    assert (refusal.outcome, str(refusal)) == (Outcome.DRAINED, "while connecting")
