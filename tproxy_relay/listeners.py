"""The listening sockets: opened here, or inherited from whoever started us.

What goes wrong with them goes wrong at start, in front of the operator, so each failure becomes one line that
says what and how to mend it, with an exit code of its own.
"""

import errno
import logging
import os
import socket
from collections.abc import MutableMapping

from tproxy_relay import endpoint, notify, sockets
from tproxy_relay.endpoint import Endpoint
from tproxy_relay.errors import CapabilityMissingError, KernelUnsupportedError, SystemRefusedError
from tproxy_relay.settings import Settings
from tproxy_relay.sockets import Tuning

BACKLOG = 4096
"""Connections that may wait for accept(); the kernel caps it at net.core.somaxconn (listen(2))."""

HOW_TO_GIVE = (
    "run it as root, or give it that capability: `AmbientCapabilities=CAP_NET_RAW` in a unit, or "
    "`setpriv --reuid USER --regid GROUP --init-groups --inh-caps +net_raw --ambient-caps +net_raw tproxy-relay ...`"
)

_LISTEN = "0A"
"""net/tcp_states.h, TCP_LISTEN, as /proc/net/tcp writes it."""

_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

log = logging.getLogger(__name__)


class Listener:
    """A listening socket and the address that it listens on."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.endpoint = endpoint.from_sockaddr(sock.getsockname())
        self.name = str(self.endpoint)

    def close(self) -> None:
        """Stop listening; connections that wait in the backlog are reset by the kernel."""
        self.sock.close()


def open_all(settings: Settings, tuning: Tuning, environ: MutableMapping[str, str]) -> list[Listener]:
    """All listeners: the inherited ones if there are any (sd_listen_fds(3)), else those of the settings.

    Raises SystemRefusedError, CapabilityMissingError or KernelUnsupportedError.
    """
    try:
        descriptors = notify.inherited_descriptors(environ)
    except ValueError as error:
        raise SystemRefusedError(str(error)) from error
    if descriptors:
        return [_prepare(_adopt(fd, settings.mode), settings, tuning) for fd in descriptors]
    listeners: list[Listener] = []
    try:
        for host in settings.bind:
            for port in settings.ports:
                sock = _open(Endpoint(host, port), settings)
                if sock is None:
                    break  # nor will it with another port
                listeners.append(_prepare(sock, settings, tuning))
    except BaseException:
        close_all(listeners)
        raise
    if not listeners:
        raise SystemRefusedError(f"none of the addresses {', '.join(settings.bind)} exists on this host")
    return listeners


def close_all(listeners: list[Listener]) -> None:
    """Close every listener and forget it."""
    while listeners:
        listeners.pop().close()


def _open(address: Endpoint, settings: Settings) -> socket.socket | None:
    """A bound socket; None for the IPv6 wildcard on a host without IPv6."""
    try:
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        _pass_over_or_raise(address, error)
        return None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if settings.interface:
            _bind_to_interface(sock, settings.interface)
        sock.bind(address.sockaddr)  # before it is transparent: then it would take any address, a mistyped one too
        if settings.mode == "tproxy":
            _make_transparent(sock, address)
        return sock
    except OSError as error:
        sock.close()
        _pass_over_or_raise(address, error)
        return None
    except BaseException:
        sock.close()
        raise


def _pass_over_or_raise(address: Endpoint, error: OSError) -> None:
    """A host without IPv6 gets a warning for the IPv6 wildcard, which is in the default; the rest is an error."""
    if address.host == "::" and error.errno in _NO_IPV6:
        log.warning("no IPv6 on this host, listening on IPv4 only", extra={"listener": str(address)})
        return
    raise SystemRefusedError(f"cannot listen on {address}: {_remedy(address, error)}") from error


def _remedy(address: Endpoint, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"the port is taken; `ss -ltnp 'sport = :{address.port}'` shows by whom. "
            "Stop that program, or choose other ports with --ports"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "no interface has that address (`ip address` lists them); change --bind"
    if error.errno == errno.EACCES:
        return "ports below net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE; choose a higher one"
    return os.strerror(error.errno or 0)


def _bind_to_interface(sock: socket.socket, interface: str) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise SystemRefusedError(f"no interface {interface!r} on this host (`ip link` lists them)") from error
        if error.errno == errno.EPERM:
            raise CapabilityMissingError(
                f"cannot bind to {interface}: CAP_NET_RAW is missing; {HOW_TO_GIVE}"
            ) from error
        raise


def _make_transparent(sock: socket.socket, address: Endpoint) -> None:
    try:
        sockets.set_transparent(sock)
    except PermissionError as error:
        raise CapabilityMissingError(
            f"cannot make {address} transparent: CAP_NET_RAW is missing; {HOW_TO_GIVE}. "
            "Or let a service manager open the sockets, or use --mode redirect"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise KernelUnsupportedError(
                f"this kernel has no IP_TRANSPARENT for {address} ({os.strerror(error.errno)}), so no TPROXY; "
                "use a kernel with CONFIG_NETFILTER_XT_TARGET_TPROXY / CONFIG_NFT_TPROXY, or --mode redirect"
            ) from error
        raise


def _adopt(fd: int, mode: str) -> socket.socket:
    """An inherited socket, once it has proven to be what we need."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise SystemRefusedError(f"inherited descriptor {fd} is not a socket ({error.strerror})") from error
    sock.set_inheritable(False)
    fault = _unfit(sock, mode)
    if fault:
        sock.detach()
        raise SystemRefusedError(f"inherited descriptor {fd} {fault}")
    return sock


def _unfit(sock: socket.socket, mode: str) -> str | None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return "is not a TCP socket"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is not listening"
    if mode == "tproxy" and not sockets.is_transparent(sock):
        return "is not transparent: the kernel would give it no intercepted connection. Set `Transparent=yes`"
    return None


def _prepare(sock: socket.socket, settings: Settings, tuning: Tuning) -> Listener:
    sock.setblocking(False)
    try:
        sockets.tune(sock, tuning)
        sock.listen(BACKLOG)
        return Listener(sock)
    except OSError as error:
        address = endpoint.from_sockaddr(sock.getsockname())
        sock.close()
        raise SystemRefusedError(f"cannot listen on {address}: {_remedy(address, error)}") from error


def listening_ports() -> set[int]:
    """The TCP ports on which somebody listens in this network namespace (proc(5), /proc/net/tcp)."""
    ports = set()
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/net/{table}", encoding="ascii") as lines:
                for line in lines:
                    fields = line.split()
                    if len(fields) > 3 and fields[3] == _LISTEN:
                        ports.add(int(fields[1].rsplit(":", 1)[1], 16))
        except OSError:
            continue  # no such family here
    return ports
