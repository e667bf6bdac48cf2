"""The kernel's numbers and layouts that Python's socket module lacks, each with the header it comes from.

Nothing here opens a socket or decides anything.
"""

import struct
from functools import lru_cache
from typing import NamedTuple

IP_TRANSPARENT = 19
"""linux/in.h: accept and connect with addresses that are not this host's. Needs CAP_NET_RAW or CAP_NET_ADMIN."""

IPV6_TRANSPARENT = 75
"""linux/in6.h: the same for IPv6."""

IP_BIND_ADDRESS_NO_PORT = 24
"""linux/in.h: bind() to an address with port 0 leaves the port to connect(), so that one port serves many
destinations. Works at level SOL_IP on IPv6 sockets too."""

IP_FREEBIND = 15
"""linux/in.h: bind() to an address that is not there yet. Works at level SOL_IP on IPv6 sockets too."""

SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv4.h, level SOL_IP: the address before a REDIRECT or DNAT, as a sockaddr_in."""

IP6T_SO_ORIGINAL_DST = 80
"""linux/netfilter_ipv6/ip6_tables.h, level SOL_IPV6: the same as a sockaddr_in6."""

SO_MAX_PACING_RATE = 47
"""asm-generic/socket.h: bytes a second that a socket may send; cut into even pieces by TCP itself (Linux 4.20)."""

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
"""asm-generic/socket.h: a classic BPF program that says of each packet how much of it the socket gets."""

SO_BINDTOIFINDEX = 62
"""asm-generic/socket.h: SO_BINDTODEVICE (socket(7)) by the number of the interface, which it also tells (Linux 5.0)."""

BPF_LD_W_ABS, BPF_JEQ_K, BPF_RET = 0x20, 0x15, 0x06
"""linux/bpf_common.h: load a word of the packet, compare it with a constant, end with a constant."""

SKF_AD_IFINDEX = 0xFFFFF000 + 8
"""linux/filter.h, SKF_AD_OFF + SKF_AD_IFINDEX: where a program finds the number of the interface that a packet came in
by."""

SOCK_FILTER = struct.Struct("@HBBI")
"""linux/filter.h, struct sock_filter: code, jump if true, jump if false, constant."""

SOCK_FPROG = struct.Struct("@HP")
"""linux/filter.h, struct sock_fprog: how many of them, and the address of the first."""

SIOCOUTQ = 0x5411
"""linux/sockios.h (equal to TIOCOUTQ): bytes in a TCP socket's send queue that the peer has not acknowledged."""

TCP_CLOSE = 7
"""net/tcp_states.h: the socket is dead; after our own FIN it is the ordinary end, before it somebody reset it."""

SOCKADDR_IN = struct.Struct("=H2s4s8x")
"""linux/in.h, 16 bytes: family (host order), port (network order), address."""

SOCKADDR_IN6 = struct.Struct("=H2sI16sI")
"""linux/in6.h, 28 bytes: family (host order), port (network order), flow, address, scope."""

MARK = struct.Struct("@I")
"""socket(7), SO_MARK: the fwmark."""

PACING_RATE = struct.Struct("@I")
"""SO_MAX_PACING_RATE."""

UCRED = struct.Struct("@3i")
"""unix(7), SO_PEERCRED: process, user and group id."""

LINGER = struct.Struct("@ii")
"""linux/socket.h, struct linger: on or off, seconds."""

TIMEVAL = struct.Struct("@ll")
"""struct timeval of SO_RCVTIMEO and SO_SNDTIMEO (socket(7)): seconds, microseconds."""

TCP_INFO_LENGTH = 104
"""linux/tcp.h, struct tcp_info up to and with tcpi_total_retrans; newer kernels only append."""

_U32 = struct.Struct("@I")
_TCPI_UNACKED_OFFSET, _TCPI_SACKED_OFFSET = 24, 28
_TCPI_RTT_OFFSET = 68
_TCPI_TOTAL_RETRANS_OFFSET = 100


class TcpInfo(NamedTuple):
    """The fields of struct tcp_info (linux/tcp.h) that the relay uses."""

    state: int
    rtt_us: int
    """Smoothed round-trip time in microseconds."""
    retransmits: int
    """Segments sent again since the connection began."""


def unpack_tcp_info(raw: bytes) -> TcpInfo:
    """The fields that we use of a struct tcp_info (linux/tcp.h); struct.error if it is short."""
    (rtt,) = _U32.unpack_from(raw, _TCPI_RTT_OFFSET)
    (retransmits,) = _U32.unpack_from(raw, _TCPI_TOTAL_RETRANS_OFFSET)
    return TcpInfo(raw[0], rtt, retransmits)


def unpack_backlog(raw: bytes) -> tuple[int, int]:
    """Of a listener's struct tcp_info: tcpi_unacked and tcpi_sacked, which are something else there
    (net/ipv4/tcp.c, tcp_get_info: the connections that wait for accept(), and how many may)."""
    (waiting,) = _U32.unpack_from(raw, _TCPI_UNACKED_OFFSET)
    (most,) = _U32.unpack_from(raw, _TCPI_SACKED_OFFSET)
    return waiting, most


@lru_cache(maxsize=64)
def pack_timeval(seconds: float) -> bytes:
    """A struct timeval; at least one microsecond for anything above 0, because 0 means for ever."""
    micros = max(round(seconds * 1_000_000), 1) if seconds > 0 else 0
    return TIMEVAL.pack(micros // 1_000_000, micros % 1_000_000)
