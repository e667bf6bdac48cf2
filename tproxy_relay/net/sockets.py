"""What we ask of the kernel about one TCP socket: options, connecting, and the ways to end.

Every setsockopt of the relay is here or in listeners.py. Nothing here knows of connections or settings
files; OSError goes to the caller as it is.

Options that an accepted socket inherits from its listener (on Linux: all that `tune` sets) are set once, on
the listener, so that they hold from the first packet on and cost nothing per connection.
"""

import array
import fcntl
import socket
from dataclasses import dataclass
from functools import cached_property

from tproxy_relay.net import linux
from tproxy_relay.net.endpoint import Endpoint

SEND_TICK = 1.0
"""Seconds after which a send() that found no room returns, so that its thread can see whether it is still
wanted. shutdown(SHUT_RD) wakes a reader; nothing that sends no FIN wakes a writer."""

PROBES_IN_IDLE_TIME = 4
"""Keepalive probes follow each other a quarter of the idle time apart, or a second: TCP_KEEPINTVL knows no less."""

KEEPALIVE_PATIENCE = 12
"""Idle times for which probes may stay unanswered; then the peer counts as gone. Networks come back: switches boot,
lines are redialled, laptops wake up. With the default of 60 seconds an outage of eleven minutes is outlived."""

_RESET_ON_CLOSE = linux.LINGER.pack(1, 0)
_FIN_ON_CLOSE = linux.LINGER.pack(0, 0)


@dataclass(frozen=True)
class Tuning:
    """What every socket of the relay is set to, on both legs."""

    keepalive: int
    """Seconds of silence before the first probe; 0: none. The peer counts as gone after KEEPALIVE_PATIENCE times as
    long without an answer, or after `user_timeout`, if there is one."""
    user_timeout: float
    """Seconds that sent data may stay unacknowledged (TCP_USER_TIMEOUT, tcp(7)); 0: the kernel's choice."""
    mark: int
    """The fwmark (SO_MARK) that exempts the relay's own packets from interception; 0: none."""

    @cached_property
    def options(self) -> tuple[tuple[int, int, int | bytes], ...]:
        """What `tune` sets, ready for setsockopt(): it is the same for each connection.

        The first one matters most: while SO_LINGER is (1, 0), the kernel resets the connection whenever the
        descriptor goes, also by kill -9 or a crash. A broken transfer must never look complete.
        """
        tcp, sol = int(socket.IPPROTO_TCP), int(socket.SOL_SOCKET)
        options: list[tuple[int, int, int | bytes]] = [
            (sol, socket.SO_LINGER, _RESET_ON_CLOSE),
            (tcp, socket.TCP_NODELAY, 1),
            (sol, socket.SO_OOBINLINE, 1),
            (sol, socket.SO_SNDTIMEO, linux.pack_timeval(SEND_TICK)),
        ]
        if self.keepalive:
            interval = max(1, self.keepalive // PROBES_IN_IDLE_TIME)
            options.append((sol, socket.SO_KEEPALIVE, 1))
            options.append((tcp, socket.TCP_KEEPIDLE, self.keepalive))
            options.append((tcp, socket.TCP_KEEPINTVL, interval))
            options.append((tcp, socket.TCP_KEEPCNT, self.keepalive * KEEPALIVE_PATIENCE // interval))
        if self.user_timeout:
            options.append((tcp, socket.TCP_USER_TIMEOUT, max(1, round(self.user_timeout * 1000))))
        if self.mark:
            options.append((sol, socket.SO_MARK, linux.MARK.pack(self.mark)))
        return tuple(options)


@dataclass(frozen=True)
class PathTuning:
    """What is chosen for the way to the clients, or for that to the servers. Not set on listeners: a reload could not
    take it back."""

    congestion: str | None
    pacing: int
    """Bytes a second; 0: no limit."""
    buffer: int
    """Bytes, each way; 0: the kernel decides. It doubles the number for its own use (socket(7))."""

    @cached_property
    def options(self) -> tuple[tuple[int, int, int | bytes], ...]:
        """What `tune` sets, ready for setsockopt(): level, name, value."""
        options: list[tuple[int, int, int | bytes]] = []
        if self.congestion:
            options.append((int(socket.IPPROTO_TCP), socket.TCP_CONGESTION, self.congestion.encode()))
        if self.pacing:
            options.append((int(socket.SOL_SOCKET), linux.SO_MAX_PACING_RATE, linux.PACING_RATE.pack(self.pacing)))
        if self.buffer:
            options += [(int(socket.SOL_SOCKET), name, self.buffer) for name in (socket.SO_RCVBUF, socket.SO_SNDBUF)]
        return tuple(options)


def tune(sock: socket.socket, tuning: Tuning | PathTuning) -> None:
    """Set all options of this tuning on the socket. Raises OSError for the first that the kernel refuses."""
    for level, name, value in tuning.options:
        sock.setsockopt(level, name, value)


def untune(sock: socket.socket) -> None:
    """Take back what `tune` sets for some settings and not for others."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


def set_mark(sock: socket.socket, mark: int) -> None:
    """SO_MARK (socket(7)), all 32 bits of it: setsockopt() takes an int for a signed one.

    PermissionError without CAP_NET_RAW (Linux 5.17) or CAP_NET_ADMIN.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, linux.MARK.pack(mark))


def set_transparent(sock: socket.socket) -> None:
    """Let the socket accept, or bind to, addresses that are not this host's.

    PermissionError without CAP_NET_RAW or CAP_NET_ADMIN in the socket's network namespace.
    """
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.SOL_IP, linux.IP_TRANSPARENT, 1)


def is_transparent(sock: socket.socket) -> bool:
    """True if connections to foreign addresses may arrive at this listener."""
    if sock.family == socket.AF_INET6:
        return bool(sock.getsockopt(socket.IPPROTO_IPV6, linux.IPV6_TRANSPARENT))
    return bool(sock.getsockopt(socket.SOL_IP, linux.IP_TRANSPARENT))


def set_send_timeout(sock: socket.socket, seconds: float) -> None:
    """SO_SNDTIMEO (socket(7)), which bounds connect() too. The kernel keeps the time: settimeout() would put
    a poll(2) before every call."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, linux.pack_timeval(seconds))


def set_receive_timeout(sock: socket.socket, seconds: float) -> None:
    """Let each recv() raise BlockingIOError after so many seconds (SO_RCVTIMEO, socket(7)); 0: it waits for ever."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, linux.pack_timeval(seconds))


def upstream_socket(family: socket.AddressFamily, tuning: Tuning) -> socket.socket:
    """A socket towards a server, armed and tuned, not yet bound or connected."""
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        tune(sock, tuning)
    except OSError:
        sock.close()
        raise
    return sock


def bind_foreign(sock: socket.socket, source: Endpoint) -> None:
    """Let the server see `source` instead of us; with port 0 the kernel picks one at connect().

    SO_REUSEADDR: without it a client that reuses its port meets our own TIME_WAIT for 60 s.
    """
    set_transparent(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if source.port == 0:
        sock.setsockopt(socket.SOL_IP, linux.IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind(source.sockaddr)


def connect(sock: socket.socket, destination: Endpoint, timeout: float) -> None:
    """Connect within `timeout` seconds; TimeoutError after that, otherwise the OSError of connect(2).

    Another thread ends it early with shutdown(SHUT_RD).
    """
    set_send_timeout(sock, timeout)
    try:
        sock.connect(destination.sockaddr)
    except BlockingIOError as error:  # EINPROGRESS: SO_SNDTIMEO has run out (socket(7))
        raise TimeoutError("no answer to the SYN") from error
    set_send_timeout(sock, SEND_TICK)


def half_close(sock: socket.socket) -> None:
    """Send a FIN; what the peer sends still arrives. A peer that is gone needs none."""
    _shutdown(sock, socket.SHUT_WR)


def wake_reader(sock: socket.socket) -> None:
    """Make a blocked recv() or connect() in another thread return. Sends nothing: SHUT_RDWR would send a FIN,
    and a reset after it comes too late to say that the transfer is broken."""
    _shutdown(sock, socket.SHUT_RD)


def _shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:
        return  # ENOTCONN: the peer has reset the connection; its reader is told by the kernel


def finish_with_fin(sock: socket.socket) -> None:
    """Disarm the reset: close() then lets the kernel deliver what is still queued."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _FIN_ON_CLOSE)


def unacknowledged(sock: socket.socket) -> int:
    """Bytes (and the FIN) in the send queue that the peer's kernel has not acknowledged."""
    queued = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), linux.SIOCOUTQ, queued)
    return queued[0]


def tcp_info(sock: socket.socket) -> linux.TcpInfo:
    """State, round-trip time and retransmits of a connection, now."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, linux.TCP_INFO_LENGTH)
    return linux.unpack_tcp_info(raw)


def backlog(sock: socket.socket) -> tuple[int, int]:
    """Of a listener: connections that wait for accept(), and how many may."""
    return linux.unpack_backlog(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, linux.TCP_INFO_LENGTH))


def is_dead(sock: socket.socket) -> bool:
    """True if TCP has given up this socket: before our own FIN that means a reset or a timeout, whichever
    thread's call the kernel told of it."""
    return tcp_info(sock).state == linux.TCP_CLOSE


_NOBODYS = {socket.AF_INET: Endpoint("240.0.0.1", 0), socket.AF_INET6: Endpoint("100::1", 0)}
"""Addresses that no host has (RFC 1112, RFC 6666)."""


def is_local_address(endpoint: Endpoint) -> bool:
    """True if the address is one of this host's: only then may an ordinary socket bind to it.

    With net.ipv4.ip_nonlocal_bind=1 it may bind to all. Then an own address is one that the kernel would also take as
    the source towards itself, which further addresses of an interface in the same network are not.
    """
    return _may_bind(endpoint) and (not _may_bind(_NOBODYS[endpoint.family]) or _is_own_source(endpoint))


def _may_bind(endpoint: Endpoint) -> bool:
    with socket.socket(endpoint.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setsockopt(socket.SOL_IP, linux.IP_BIND_ADDRESS_NO_PORT, 1)
        try:
            probe.bind(endpoint.with_port(0).sockaddr)
        except OSError:
            return False
    return True


def _is_own_source(endpoint: Endpoint) -> bool:
    with socket.socket(endpoint.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(endpoint.with_port(9).sockaddr)  # sends nothing
        except OSError:
            return False
        source = probe.getsockname()[0]
    return source in (endpoint.host, "127.0.0.1", "::1")
