"""What client and server of the demo do with each other, directly."""

import contextlib
import socket

import pytest

from tproxy_relay.demo import exchanges
from tproxy_relay.lab import Lab

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])


@FAMILIES
def test_a_web_server_says_whom_it_sees(lab: Lab, family: int) -> None:
    with contextlib.closing(exchanges.WebServer(lab.server, 9080)):
        answer = exchanges.get(lab, 9080, family)
    assert answer.status == 200 and answer.seen == answer.name
    assert answer.asked_for[:2] == (lab.server.address(family), 9080)
    with pytest.raises(ConnectionRefusedError):
        exchanges.get(lab, 9080, family)


@FAMILIES
def test_a_half_close(lab: Lab, family: int) -> None:
    with exchanges.conversation(lab, 9081, family) as talk:
        assert talk.seen == talk.name
        assert exchanges.half_close(talk) == (exchanges.digest(exchanges.UPLOAD), "EOF")


def test_a_reset(lab: Lab) -> None:
    with exchanges.conversation(lab, 9081) as talk:
        assert exchanges.break_off(talk) == (exchanges.BEFORE_RESET, "ECONNRESET")


def test_what_happens_in_the_background_comes_out() -> None:
    assert exchanges.Background(lambda: 5).result() == 5
    with pytest.raises(ZeroDivisionError):
        exchanges.Background(lambda: 1 // 0).result()


def test_what_hangs_in_the_background_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "STEP_TIMEOUT", 0.05)
    one, other = socket.socketpair()
    with one:
        with other, pytest.raises(TimeoutError, match="hangs"):
            exchanges.Background(lambda: one.recv(1)).result()
