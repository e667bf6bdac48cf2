"""A listener hears one interface only, connections that it has accepted hear all of them."""

import socket
from collections.abc import Callable
from typing import NoReturn

import children
import loopback
import pytest

from tproxy_relay.intercept import programs
from tproxy_relay.net import ingress, rtnetlink

LO = 1


@pytest.mark.parametrize("index, heard", [(LO, True), (LO + 1, False), (ingress.NOWHERE, False)])
def test_only_what_comes_in_by_that_interface(index: int, heard: bool) -> None:
    assert rtnetlink.index_of("lo") == LO
    with loopback.listen() as listener:
        ingress.keep_to(listener, index)
        with socket.socket() as client:
            client.settimeout(0.3)
            assert (client.connect_ex(listener.getsockname()) == 0) is heard


def test_a_connection_is_freed_of_it_whatever_becomes_of_the_listener() -> None:
    with loopback.listen() as listener:
        ingress.keep_to(listener, LO)
        with loopback.dial(listener.getsockname()) as client:
            accepted, _ = listener.accept()
            with accepted:
                ingress.keep_to(listener, ingress.NOWHERE)
                ingress.keep_to(accepted, ingress.NOWHERE)
                client.settimeout(0.3)
                client.sendall(b"x")
                accepted.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    accepted.recv(1)
                ingress.open_to_all(accepted)
                ingress.open_to_all(accepted)
                accepted.settimeout(5)
                assert accepted.recv(1) == b"x"


@pytest.mark.usefixtures("network")
def test_one_that_is_bound_to_an_interface_is_bound_to_the_one_that_was_made_again() -> None:
    """By a relay of before, a socket unit or a link-local address: the kernel would go on with the former number."""
    make = "ip link add one type veth peer name two".split()
    programs.run(make)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"one")
        before = ingress.bound_to(sock)
        programs.run("ip link del one".split())
        ingress.keep_to(sock, ingress.NOWHERE)
        programs.run(make)
        ingress.keep_to(sock, rtnetlink.index_of("one"))
        assert ingress.bound_to(sock) == rtnetlink.index_of("one") != before


KEPT = """
import socket, sys
from tproxy_relay.net import ingress
with socket.socket() as sock:
    try:
        ingress.keep_to(sock, int(sys.argv[1]))
    except PermissionError as error:
        print("refused:", error)
    else:
        print("bound to", ingress.bound_to(sock))
"""


@pytest.mark.parametrize("index, outcome", [(LO, "bound to 1"), (ingress.NOWHERE, "refused: an interface that is not")])
def test_where_a_filter_is_forbidden_the_socket_is_bound(
    index: int, outcome: str, require_or_skip: Callable[[str], NoReturn]
) -> None:
    """Linux 6.18 wants CAP_NET_ADMIN for a filter; older ones want nothing."""
    prefix = children.traced("setsockopt", "EPERM:when=1", "trace=setsockopt", require_or_skip)
    done = children.run_python(KEPT, str(index), prefix=prefix)
    assert done.stdout.startswith(outcome), done.stderr
