"""What the demo's client and server do with each other, over a connection that nobody intercepts."""

import socket

import pytest

from tproxy_relay.demo import exchanges
from tproxy_relay.demo.exchanges import Background, WebServer
from tproxy_relay.lab import Lab
from tproxy_relay.net.endpoint import Endpoint

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}


def test_what_runs_in_the_background_is_returned_or_raised() -> None:
    assert Background(lambda: 1 + 1).result() == 2
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 // 0).result()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_each_end_knows_whom_it_talks_to(lab: Lab, family: int) -> None:
    with exchanges.conversation(lab, 8001, family) as talk:
        assert talk.asked_for == Endpoint(lab.server.address(family), 8001)
        assert talk.seen == talk.name and talk.name.host == lab.client.address(family)
    assert talk.client.fileno() == talk.server.fileno() == -1


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_web_server_tells_its_visitors_whom_it_sees(lab: Lab, family: int) -> None:
    server = WebServer(lab.server, 8002)
    try:
        answer = exchanges.get(lab, 8002, family)
    finally:
        server.close()
    assert (answer.status, answer.seen, answer.asked_for) == (
        200,
        answer.name,
        Endpoint(lab.server.address(family), 8002),
    )


def test_the_server_answers_after_the_half_close(lab: Lab) -> None:
    with exchanges.conversation(lab, 8003) as talk:
        assert exchanges.half_close(talk) == (exchanges.digest(exchanges.UPLOAD), "EOF")


def test_all_that_was_sent_comes_before_the_reset(lab: Lab) -> None:
    with exchanges.conversation(lab, 8004) as talk:
        assert exchanges.break_off(talk) == (exchanges.BEFORE_RESET, "ECONNRESET")


def test_the_digest_is_of_all_bytes() -> None:
    assert exchanges.digest(b"abc") == (
        "3 bytes, SHA-256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_what_hangs_in_the_background_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "STEP_TIMEOUT", 0.05)
    one, other = socket.socketpair()
    with one:
        with other, pytest.raises(TimeoutError, match="hangs"):
            exchanges.Background(lambda: one.recv(1)).result()
