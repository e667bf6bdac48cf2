"""What the kernel tells over netlink of links, addresses, routes and rules, to whoever asks (netlink(7), rtnetlink(7)).

Only the envelope is read here: who listens decides what a message means to him.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

LINK, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE = 1, 7, 8, 9, 11, 19
"""linux/rtnetlink.h, enum rtnetlink_groups. Nobody needs a capability for them."""

_HEADER = struct.Struct("@IHHII")
"""linux/netlink.h, struct nlmsghdr: length, type, and what is of no interest here."""


class Message(NamedTuple):
    """One message."""

    kind: int
    """RTM_NEWLINK and the like; 0 where the kernel had more to tell than the socket could hold."""
    body: bytes
    """What follows the header."""


def listen(protocol: int, groups: Sequence[int]) -> socket.socket:
    """A socket that never blocks, and hears what these groups are told. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.bind((0, sum(1 << (group - 1) for group in groups)))
    except OSError:
        sock.close()
        raise
    return sock


def messages(sock: socket.socket) -> Iterator[Message]:
    """What has come since the last call. One of kind 0 where something was lost (ENOBUFS)."""
    while True:
        try:
            datagram = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            datagram = b""
        yield from _split(datagram)


def _split(datagram: bytes) -> Iterator[Message]:
    if len(datagram) < _HEADER.size:
        yield Message(0, b"")
    while len(datagram) >= _HEADER.size:
        length, kind, *_ = _HEADER.unpack_from(datagram)
        length = max(_HEADER.size, length)
        yield Message(kind, datagram[_HEADER.size : length])
        datagram = datagram[(length + 3) & ~3 :]


def index_of(interface: str) -> int:
    """The number that the interface of that name has now (netdevice(7), SIOCGIFINDEX); 0 if there is none. One that is
    deleted and made again gets another number."""
    with contextlib.suppress(OSError):
        return socket.if_nametoindex(interface)
    return 0
