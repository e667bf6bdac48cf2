"""Abstract names, and what the kernel says of who is at the other end."""

import os
import socket
from collections.abc import Callable
from typing import NoReturn

import children
import pytest

from tproxy_relay.net import unix_sockets

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

PREFIX = f"tproxy_relay/test.{os.getpid()}/"
CONNECT = """
import socket, sys
from tproxy_relay.net import unix_sockets
sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
sock.connect(unix_sockets.abstract(sys.argv[1]))
print(*unix_sockets.peer(sock), flush=True)
sys.stdin.readline()
"""
AS_NOBODY = CONNECT.replace("sock.connect", "import os; os.setuid(65534); sock.connect")


def listening(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(unix_sockets.abstract(name))
    sock.listen()
    return sock


def test_both_ends_learn_who_the_other_one_is() -> None:
    with listening(f"{PREFIX}1") as sock, children.running_python(CONNECT, f"{PREFIX}1") as child:
        with sock.accept()[0] as accepted:
            assert unix_sockets.peer(accepted) == (child.pid, os.geteuid())
        assert child.stdout is not None
        assert child.stdout.readline().split() == [str(os.getpid()), str(os.geteuid())]


def test_another_account_is_not_trusted(require_or_skip: Callable[[str], NoReturn]) -> None:
    if os.geteuid():
        require_or_skip("only root can be somebody else")
    with listening(f"{PREFIX}1") as sock, children.running_python(AS_NOBODY, f"{PREFIX}1"):
        with sock.accept()[0] as accepted:
            uid = unix_sockets.peer(accepted).uid
    assert uid == 65534 and not unix_sockets.is_trusted(uid)


def test_root_and_our_own_account_are_trusted() -> None:
    assert unix_sockets.is_trusted(0) and unix_sockets.is_trusted(os.geteuid())
    assert not unix_sockets.is_trusted(os.geteuid() + 1)


def test_the_numbers_behind_a_prefix() -> None:
    assert list(unix_sockets.numbered(PREFIX)) == []
    with listening(f"{PREFIX}17"), listening(f"{PREFIX}4"), listening(f"{PREFIX}x"), listening(f"other{PREFIX}5"):
        assert list(unix_sockets.numbered(PREFIX)) == [17, 4]
    assert list(unix_sockets.numbered(PREFIX)) == []


def test_a_prefix_is_no_pattern() -> None:
    with listening(f"{PREFIX}17"):
        assert list(unix_sockets.numbered(PREFIX.replace("/", "."))) == []
