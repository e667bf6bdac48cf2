"""Where was an intercepted connection going?

Two ways, chosen by the configured mode and never by trying one and then the other:

- `tproxy`: the kernel gave the accepted socket the destination as its own local address, so getsockname()
  has it. (getsockopt(IP_ORIGDSTADDR), which some recipes name, returns the IP_RECVORIGDSTADDR flag on a TCP
  socket, four bytes, never an address.)
- `redirect`: netfilter rewrote the destination; conntrack remembers it and hands out a sockaddr.
"""

import errno
import socket
from collections.abc import Callable

from tproxy_relay.net import endpoint, linux
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.settings import Mode

_NEVER_REDIRECTED = frozenset({errno.ENOENT, errno.ENOPROTOOPT})
"""SO_ORIGINAL_DST: conntrack has no entry for this connection, or is not loaded at all."""


def original_destination(sock: socket.socket, mode: Mode) -> Endpoint | None:
    """The original destination of an accepted socket in `mode` (`tproxy` or `redirect`).

    None if the kernel knows of no interception. In tproxy mode a connection made to the listener itself has
    the listener's own address here; policy.py tells the two apart. Raises OSError if the socket is unusable,
    ValueError if the kernel's answer is not an address of the socket's family.
    """
    return _RESOLVERS[mode](sock)


def _from_tproxy(sock: socket.socket) -> Endpoint:
    return endpoint.from_sockaddr(sock.getsockname())


def _from_redirect(sock: socket.socket) -> Endpoint | None:
    mapped = sock.family == socket.AF_INET6 and "." in sock.getsockname()[0]
    try:
        if sock.family == socket.AF_INET or mapped:
            option = (socket.SOL_IP, linux.SO_ORIGINAL_DST, linux.SOCKADDR_IN.size)
            return unpack_sockaddr_in(sock.getsockopt(*option))
        option = (socket.IPPROTO_IPV6, linux.IP6T_SO_ORIGINAL_DST, linux.SOCKADDR_IN6.size)
        return unpack_sockaddr_in6(sock.getsockopt(*option))
    except OSError as error:
        if error.errno in _NEVER_REDIRECTED:
            return None
        raise


def unpack_sockaddr_in(raw: bytes) -> Endpoint:
    """The endpoint in a struct sockaddr_in (16 bytes). ValueError if it is not one."""
    if len(raw) != linux.SOCKADDR_IN.size:
        raise ValueError(f"sockaddr_in has {len(raw)} bytes, not {linux.SOCKADDR_IN.size}")
    family, port, address = linux.SOCKADDR_IN.unpack(raw)
    _check_family(family, socket.AF_INET)
    return Endpoint(socket.inet_ntop(socket.AF_INET, address), int.from_bytes(port, "big"))


def unpack_sockaddr_in6(raw: bytes) -> Endpoint:
    """The endpoint in a struct sockaddr_in6 (28 bytes). ValueError if it is not one."""
    if len(raw) != linux.SOCKADDR_IN6.size:
        raise ValueError(f"sockaddr_in6 has {len(raw)} bytes, not {linux.SOCKADDR_IN6.size}")
    family, port, flow, address, scope_id = linux.SOCKADDR_IN6.unpack(raw)
    _check_family(family, socket.AF_INET6)
    host = socket.inet_ntop(socket.AF_INET6, address)
    return endpoint.from_sockaddr((host, int.from_bytes(port, "big"), flow, scope_id))


def _check_family(family: int, expected: socket.AddressFamily) -> None:
    if family != expected:
        raise ValueError(f"the kernel answered with address family {family}, not {int(expected)}")


_RESOLVERS: dict[Mode, Callable[[socket.socket], Endpoint | None]] = {
    "tproxy": _from_tproxy,
    "redirect": _from_redirect,
}
