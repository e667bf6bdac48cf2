"""Where a connection was going: from the socket, and from the bytes of a sockaddr."""

import socket
import struct
from collections.abc import Callable
from typing import NoReturn

import children
import loopback
import pytest

from tproxy_relay.net import endpoint
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.orig_dst import original_destination, unpack_sockaddr_in, unpack_sockaddr_in6

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def test_tproxy_takes_the_local_address() -> None:
    far, near = loopback.pair()
    with far, near:
        assert original_destination(near, "tproxy") == endpoint.from_sockaddr(far.getpeername())


def test_redirect_without_an_interception() -> None:
    """None without conntrack; with it, the listener's own address, which policy.py knows."""
    far, near = loopback.pair()
    with far, near:
        assert original_destination(near, "redirect") in (None, endpoint.from_sockaddr(near.getsockname()))


def test_there_is_no_third_mode() -> None:
    with socket.socket() as sock, pytest.raises(KeyError):
        original_destination(sock, "guess")


def test_a_dead_descriptor_is_an_error() -> None:
    sock = socket.socket()
    sock.close()
    for mode in ("tproxy", "redirect"):
        with pytest.raises(OSError):
            original_destination(sock, mode)


REDIRECTED = """
import socket, subprocess, sys
from tproxy_relay.net.orig_dst import original_destination

subprocess.run(["nft", "-f", "-"], check=True, text=True, input='''
table inet test {
chain out {
type nat hook output priority -100
ip daddr 192.0.2.9 tcp dport 80 redirect to :7000
ip6 daddr 2001:db8::9 tcp dport 80 redirect to :7000
}
}
''')
for words in ("address add 192.0.2.1/24 dev lo", "address add 2001:db8::1/64 dev lo nodad",
              "route add local 192.0.2.9 dev lo", "route add local 2001:db8::9 dev lo"):
    subprocess.run(["ip", *words.split()], check=True)
with socket.socket(socket.AF_INET6) as listener:
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", 7000))
    listener.listen()
    for host in ("192.0.2.9", "2001:db8::9"):
        with socket.create_connection((host, 80), 5) as client:
            accepted, peer = listener.accept()
            with accepted:
                print(original_destination(accepted, "redirect"))
with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", 7000))
    listener.listen()
    with socket.create_connection(("192.0.2.9", 80), 5) as client:
        accepted, peer = listener.accept()
        with accepted:
            print(original_destination(accepted, "redirect"))
"""


def test_redirect_in_a_network_of_our_own(require_or_skip: Callable[[str], NoReturn]) -> None:
    nft = ("sh", "-c", 'nft list ruleset && exec "$@"', "sh")
    prefix = children.need((*children.NETWORK, *nft), require_or_skip)
    ran = children.run_python(REDIRECTED, prefix=prefix)
    assert ran.stdout.split() == ["192.0.2.9:80", "[2001:db8::9]:80", "192.0.2.9:80"], ran.stderr


# --- the bytes


def test_a_sockaddr_in() -> None:
    raw = struct.pack("=H", socket.AF_INET) + b"\x01\xbb" + bytes([192, 0, 2, 1]) + bytes(8)
    assert unpack_sockaddr_in(raw) == Endpoint("192.0.2.1", 443)


def test_a_sockaddr_in6() -> None:
    address = socket.inet_pton(socket.AF_INET6, "fe80::1")
    raw = struct.pack("=H", socket.AF_INET6) + b"\x01\xbb" + struct.pack("=I", 9) + address + struct.pack("=I", 3)
    assert unpack_sockaddr_in6(raw) == Endpoint("fe80::1", 443, 3)


def test_a_mapped_sockaddr_in6_is_ipv4() -> None:
    address = socket.inet_pton(socket.AF_INET6, "::ffff:192.0.2.1")
    raw = struct.pack("=H", socket.AF_INET6) + b"\x00\x50" + bytes(4) + address + bytes(4)
    assert unpack_sockaddr_in6(raw) == Endpoint("192.0.2.1", 80)


@pytest.mark.parametrize(("unpack", "size"), [(unpack_sockaddr_in, 16), (unpack_sockaddr_in6, 28)])
def test_what_is_no_sockaddr(unpack: Callable[[bytes], Endpoint], size: int) -> None:
    for length in (0, 4, 15, 17, 27, 29):
        if length != size:
            with pytest.raises(ValueError, match=f"has {length} bytes, not {size}"):
                unpack(bytes(length))
    wrong = socket.AF_INET6 if size == 16 else socket.AF_INET
    with pytest.raises(ValueError, match=f"address family {int(wrong)}"):
        unpack(struct.pack("=H", wrong) + bytes(size - 2))
