"""Requests as they come, and answers as they go."""

from http import HTTPStatus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxy_relay.admin import http
from tproxy_relay.admin.http import HttpError, Request


def test_a_request() -> None:
    head = b"GET /sessions?client=10.0.0.0%2F8&sort=rate HTTP/1.1\r\nHost: localhost:9106\r\nAccept: */*\r\n\r\n"
    assert http.parse(head) == Request("GET", "/sessions", {"client": "10.0.0.0/8", "sort": "rate"}, "localhost")


@pytest.mark.parametrize(
    "head, status",
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"\x16\x03\x01\x02 / HTTP/1.1\r\n\r\n", 400),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
        (b"GET /?x=%zz&&y HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://[::1/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 200 + b"\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 413),
    ],
)
def test_what_is_odd_is_refused(head: bytes, status: int) -> None:
    with pytest.raises(HttpError) as error:
        http.parse(head)
    assert error.value.response.status == status


def test_an_old_request_has_no_host() -> None:
    assert http.parse(b"GET / HTTP/1.0\r\n\r\n").host is None


@pytest.mark.parametrize("host", ["localhost", "localhost:80", "127.0.0.1:9106", "127.9.9.9", "[::1]:1", "a.localhost"])
def test_names_of_this_host(host: str) -> None:
    request = http.parse(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert http.is_of_this_host(request.host)


@pytest.mark.parametrize(
    "host",
    ["example.org", "localhost.example.org", "127.0.0.1.example.org", "10.0.0.1", "[2001:db8::1]", "", "[::1", "@"],
)
def test_names_of_others(host: str) -> None:
    assert not http.is_of_this_host(http.parse(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).host)


def test_an_answer() -> None:
    answer = http.document({"a": 1})
    head, _, body = answer.to_bytes(with_body=True).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n")
    assert body == b'{"a":1}\n'
    assert answer.to_bytes(with_body=False) == head + b"\r\n\r\n", "HEAD: the same length, and no body"


def test_a_problem_is_one_line() -> None:
    assert http.problem(HTTPStatus.NOT_FOUND, "nothing", Allow="GET").body == b"nothing\n"


@given(st.binary(max_size=300))
def test_whatever_comes_is_a_request_or_an_error(junk: bytes) -> None:
    try:
        http.parse(junk)
    except HttpError as error:
        assert error.response.status >= 400


@given(st.text(st.characters(codec="latin-1"), max_size=40), st.text(st.characters(codec="latin-1"), max_size=40))
def test_whatever_stands_in_a_request(target: str, host: str) -> None:
    try:
        request = http.parse(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
    except HttpError:
        return
    http.is_of_this_host(request.host)
