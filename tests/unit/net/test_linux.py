"""The layouts, held against what this kernel really hands out."""

import socket
import struct

import loopback
import pytest

from tproxy_relay.net import linux


def test_the_sizes_of_the_headers() -> None:
    assert linux.SOCKADDR_IN.size == 16
    assert linux.SOCKADDR_IN6.size == 28
    assert linux.LINGER.size == 8
    assert linux.MARK.size == 4
    assert linux.TIMEVAL.size == struct.calcsize("@ll")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, (0, 0)),
        (1, (1, 0)),
        (2.5, (2, 500_000)),
        (0.25, (0, 250_000)),
        (1e-9, (0, 1)),
        (0.9999999, (1, 0)),
        (-1, (0, 0)),
    ],
)
def test_a_timeval(seconds: float, expected: tuple[int, int]) -> None:
    assert linux.TIMEVAL.unpack(linux.pack_timeval(seconds)) == expected


def test_a_timeval_as_the_kernel_understands_it() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, linux.pack_timeval(2.5))
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, linux.TIMEVAL.size)
    assert abs(linux.TIMEVAL.unpack(raw)[1] - 500_000) <= 10_000


def test_tcp_info_of_this_kernel() -> None:
    far, near = loopback.pair()
    with far, near:
        near.send(b"x")
        far.recv(1)
        raw = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, linux.TCP_INFO_LENGTH)
        assert len(raw) == linux.TCP_INFO_LENGTH
        info = linux.unpack_tcp_info(raw)
        assert info.state == 1
        assert 0 < info.rtt_us < 1_000_000


def test_the_fields_of_tcp_info_are_where_the_header_has_them() -> None:
    raw = bytearray(104)
    raw[0] = 7
    raw[68:72] = (1234).to_bytes(4, "little" if struct.pack("@H", 1)[0] else "big")
    raw[100:104] = (56).to_bytes(4, "little" if struct.pack("@H", 1)[0] else "big")
    assert linux.unpack_tcp_info(bytes(raw)) == (linux.TCP_CLOSE, 1234, 56)


def test_a_short_tcp_info_is_no_tcp_info() -> None:
    with pytest.raises(struct.error):
        linux.unpack_tcp_info(bytes(100))
