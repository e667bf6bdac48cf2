"""Changes to rules: the kernel reports them, over netlink, to whoever asks (netlink(7), rtnetlink(7)).

What changed is not read here, only that something did. The legacy iptables report nothing.
"""

import socket
import struct
from collections.abc import Iterator, Sequence

from tproxy_relay.intercept.routing import PROTOCOL

_NETLINK_NETFILTER = 12
"""linux/netlink.h."""
_NFNLGRP_NFTABLES = 7
"""linux/netfilter/nfnetlink.h; needs CAP_NET_ADMIN."""
_RTNLGRP_LINK, _RTNLGRP_IPV4_ROUTE, _RTNLGRP_IPV4_RULE, _RTNLGRP_IPV6_ROUTE, _RTNLGRP_IPV6_RULE = 1, 7, 8, 11, 19
"""linux/rtnetlink.h. Links, because routes of a link that goes down are dropped without a word."""
_RTM_NEWROUTE, _RTM_DELROUTE = 24, 25

_HEADER = struct.Struct("@IHHII")
"""linux/netlink.h, struct nlmsghdr: length, type, and what is of no interest here."""
_RTM_PROTOCOL = _HEADER.size + 5
"""linux/rtnetlink.h, struct rtmsg: where in a message about a route it says whose route it is."""


PROBE_LINKS = "tprchk"
"""What the names of the links begin with that the self-probe makes for a moment (check/selfprobe.py)."""


class Changes:
    """Hears of changes to rules of nftables or of routing, to links or to routes."""

    def __init__(self, *, nftables: bool) -> None:
        self.sockets: list[socket.socket] = []
        """Readable when something has changed."""
        self.complete = nftables
        """False if some changes are not reported: then one has to check from time to time."""
        routing = (_RTNLGRP_LINK, _RTNLGRP_IPV4_ROUTE, _RTNLGRP_IPV4_RULE, _RTNLGRP_IPV6_ROUTE, _RTNLGRP_IPV6_RULE)
        wanted: dict[int, Sequence[int]] = {socket.NETLINK_ROUTE: routing}
        if nftables:
            wanted[_NETLINK_NETFILTER] = (_NFNLGRP_NFTABLES,)
        for protocol, groups in wanted.items():
            try:
                self.sockets.append(_listen(protocol, groups))
            except OSError:  # not in this kernel, or kept from us by a service manager
                self.complete = False

    def read(self) -> bool:
        """True if a change that may concern us has been reported since the last call."""
        return any([_concerns_us(message) for sock in self.sockets for message in _messages(sock)])


def _listen(protocol: int, groups: Sequence[int]) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
    try:
        sock.bind((0, sum(1 << (group - 1) for group in groups)))
    except OSError:
        sock.close()
        raise
    return sock


def _messages(sock: socket.socket) -> Iterator[bytes]:
    """What has come; an empty one where the kernel had more to tell than the socket could hold (ENOBUFS)."""
    while True:
        try:
            datagram = sock.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            datagram = b""
        yield from _split(datagram)


def _split(datagram: bytes) -> Iterator[bytes]:
    if len(datagram) < _HEADER.size:
        yield b""
    while len(datagram) >= _HEADER.size:
        length = max(_HEADER.size, _HEADER.unpack_from(datagram)[0])
        yield datagram[:length]
        datagram = datagram[(length + 3) & ~3 :]


def _concerns_us(message: bytes) -> bool:
    """Routes of others come and go all the time on a router, and the self-probe's links with each probe."""
    if PROBE_LINKS.encode() in message:
        return False
    if len(message) <= _RTM_PROTOCOL or _HEADER.unpack_from(message)[1] not in (_RTM_NEWROUTE, _RTM_DELROUTE):
        return True
    return message[_RTM_PROTOCOL] == PROTOCOL
