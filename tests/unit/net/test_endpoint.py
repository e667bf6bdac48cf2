"""One spelling for every address."""

import socket

import pytest

from tproxy_relay.net.endpoint import Endpoint, from_sockaddr


@pytest.mark.parametrize(
    ("sockaddr", "text", "family"),
    [
        (("192.0.2.1", 80), "192.0.2.1:80", socket.AF_INET),
        (("2001:db8::1", 443, 0, 0), "[2001:db8::1]:443", socket.AF_INET6),
        (("fe80::1", 443, 0, 3), "[fe80::1%3]:443", socket.AF_INET6),
        (("::ffff:192.0.2.1", 80, 0, 0), "192.0.2.1:80", socket.AF_INET),
        (("::ffff:0:1", 80, 0, 0), "[::ffff:0:1]:80", socket.AF_INET6),
        (("::1", 80), "[::1]:80", socket.AF_INET6),
        (("::", 0, 7, 0), "[::]:0", socket.AF_INET6),
    ],
)
def test_from_sockaddr(sockaddr: tuple[object, ...], text: str, family: int) -> None:
    made = from_sockaddr(sockaddr)
    assert str(made) == text
    assert made.family == family


def test_the_form_that_connect_takes() -> None:
    assert Endpoint("192.0.2.1", 80).sockaddr == ("192.0.2.1", 80)
    assert Endpoint("fe80::1", 80, 3).sockaddr == ("fe80::1", 80, 0, 3)


def test_there_and_back() -> None:
    for one in (Endpoint("192.0.2.1", 80), Endpoint("2001:db8::1", 80), Endpoint("fe80::1", 80, 3)):
        assert from_sockaddr(one.sockaddr) == one


def test_with_port_keeps_the_rest() -> None:
    assert Endpoint("fe80::1", 80, 3).with_port(0) == Endpoint("fe80::1", 0, 3)


def test_a_mapped_address_equals_the_plain_one() -> None:
    mapped, plain = from_sockaddr(("::ffff:192.0.2.1", 80, 0, 0)), from_sockaddr(("192.0.2.1", 80))
    assert mapped == plain
    assert hash(mapped) == hash(plain)
