"""Changes to rules: the kernel reports them, over netlink, to whoever asks (net/rtnetlink.py).

What changed is not read here, only that something did. The legacy iptables report nothing.
"""

import socket
import struct
from collections.abc import Sequence

from tproxy_relay.intercept.routing import PROTOCOL
from tproxy_relay.net import rtnetlink
from tproxy_relay.net.rtnetlink import Message

_NETLINK_NETFILTER = 12
"""linux/netlink.h."""
_NFNLGRP_NFTABLES = 7
"""linux/netfilter/nfnetlink.h; needs CAP_NET_ADMIN."""
_ROUTING = (
    rtnetlink.LINK,  # routes of a link that goes down are dropped without a word
    rtnetlink.IPV4_ROUTE,
    rtnetlink.IPV4_RULE,
    rtnetlink.IPV6_IFADDR,  # with the first address comes IPv6
    rtnetlink.IPV6_ROUTE,
    rtnetlink.IPV6_RULE,
)
_RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 20, 21, 24, 25
"""linux/rtnetlink.h."""
_PROTOCOL = 5
"""linux/rtnetlink.h, struct rtmsg: where in a message about a route it says whose route it is."""
_ADDRESS = struct.Struct("@4BI")
"""linux/if_addr.h, struct ifaddrmsg: family, length of the prefix, flags, scope, number of the interface."""
_LO = 1
"""The number of lo in each network namespace (net/core/net_namespace.c)."""


PROBE_LINKS = "tprchk"
"""What the names of the links begin with that the self-probe makes for a moment (check/selfprobe.py)."""


class Changes:
    """Hears of changes to rules of nftables or of routing, to links, to routes, or to the IPv6 addresses of lo."""

    def __init__(self, *, nftables: bool) -> None:
        self.sockets: list[socket.socket] = []
        """Readable when something has changed."""
        self.complete = nftables
        """False if some changes are not reported: then one has to check from time to time."""
        wanted: dict[int, Sequence[int]] = {socket.NETLINK_ROUTE: _ROUTING}
        if nftables:
            wanted[_NETLINK_NETFILTER] = (_NFNLGRP_NFTABLES,)
        for protocol, groups in wanted.items():
            try:
                self.sockets.append(rtnetlink.listen(protocol, groups))
            except OSError:  # not in this kernel, or kept from us by a service manager
                self.complete = False

    def read(self) -> bool:
        """True if a change that may concern us has been reported since the last call."""
        return any([_concerns_us(message) for sock in self.sockets for message in rtnetlink.messages(sock)])


def _concerns_us(message: Message) -> bool:
    """Routes of others come and go all the time on a router, addresses are renewed, the self-probe's links are there
    for a moment; lo, where our route leads, has an address as long as IPv6 is on."""
    if PROBE_LINKS.encode() in message.body:
        return False
    if message.kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
        return len(message.body) <= _PROTOCOL or message.body[_PROTOCOL] == PROTOCOL
    if message.kind in (_RTM_NEWADDR, _RTM_DELADDR):
        return len(message.body) < _ADDRESS.size or _ADDRESS.unpack_from(message.body)[4] == _LO
    return True
