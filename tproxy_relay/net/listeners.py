"""The listening sockets: opened here, or inherited from whoever started us.

What goes wrong with them goes wrong at start, in front of the operator, so each failure becomes one line that
says what and how to mend it, with an exit code of its own.
"""

import errno
import ipaddress
import logging
import os
import socket
from collections.abc import MutableMapping, Sequence

from tproxy_relay.errors import CapabilityMissingError, KernelUnsupportedError, SystemRefusedError
from tproxy_relay.net import endpoint, ingress, linux, rtnetlink, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.settings import Mode, Settings
from tproxy_relay.system import systemd

BACKLOG = 4096
"""Connections that may wait for accept(); the kernel caps it at net.core.somaxconn (listen(2))."""

HOW_TO_GIVE = (
    "run it as root, or give it that capability: `AmbientCapabilities=CAP_NET_RAW` in a unit, or "
    "`setpriv --reuid USER --regid GROUP --init-groups --inh-caps +net_raw --ambient-caps +net_raw tproxy-relay ...`"
)

STORED_PREFIX = "tproxy_relay.listener."
"""Begins the names of sockets that a relay has stored; those of socket units are file names of theirs."""

_NO_IPV6 = frozenset({errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL})

log = logging.getLogger(__name__)


class Listener:
    """A listening socket and the address that it listens on."""

    def __init__(self, sock: socket.socket, wanted: Endpoint | None = None, *, stored: bool = False) -> None:
        """`wanted`: the address that it was opened for; the port may have been 0, for any. `stored`: a relay before
        this one has opened it, and left it with the service manager."""
        self.sock = sock
        self.stored = stored
        self.endpoint = endpoint.from_sockaddr(sock.getsockname())
        self.wanted = wanted or self.endpoint
        self.name = str(self.endpoint)

    @property
    def stored_name(self) -> str:
        """By which a service manager keeps it (FDNAME of sd_notify(3), in which a colon may not be)."""
        return STORED_PREFIX + self.name.replace(":", "_")

    def close(self) -> None:
        """Stop listening. Connections that wait in the backlog are reset by the kernel, unless another process
        has the socket too."""
        self.sock.close()


def open_all(settings: Settings, tuning: Tuning, kept: Sequence[Listener] = ()) -> list[Listener]:
    """The listeners of the settings: those of `kept` that are among them, and the others opened.

    Raises SystemRefusedError, CapabilityMissingError or KernelUnsupportedError, and leaves `kept` as it was.
    """
    by_address = {listener.wanted: listener for listener in kept}
    listeners: list[Listener] = []
    try:
        for host in settings.bind:
            for port in settings.ports:
                wanted = Endpoint(host, port)
                listener = by_address.get(wanted)
                if listener is None:
                    _refuse_overlap(wanted, kept)
                    listener = _open_one(wanted, settings, tuning)
                elif listener.stored:
                    _make_fit(listener, settings)
                if listener is None:
                    break  # nor will it with another port
                listeners.append(listener)
    except BaseException:
        close_all([listener for listener in listeners if listener not in kept])
        raise
    if not listeners:
        raise SystemRefusedError(f"none of the addresses {', '.join(settings.bind)} exists on this host")
    return listeners


def adopt_all(settings: Settings, environ: MutableMapping[str, str]) -> tuple[list[Listener], list[str]]:
    """The listeners that were passed to this process (sd_listen_fds(3)), and the names of what else a relay before
    this one seems to have stored. Raises SystemRefusedError for any other that will not do."""
    try:
        inherited = systemd.inherited_descriptors(environ)
    except ValueError as error:
        raise SystemRefusedError(str(error)) from error
    adopted, unfit = [], []
    for fd, name in inherited:
        stored = name.startswith(STORED_PREFIX)
        try:
            adopted.append(Listener(_adopt(fd, settings, stored), stored=stored))
        except SystemRefusedError:
            if not stored:
                raise
            unfit.append(name)
    return adopted, unfit


def tune(listener: Listener, tuning: Tuning) -> None:
    """Set what the connections that it accepts inherit. Raises SystemRefusedError."""
    _prepare(listener.sock, tuning, listener.wanted)


def confine(listener: Listener, interface: str | None) -> None:
    """Let in only clients that come in by the interface of that name, as it is now: nobody while there is none; None:
    those of all interfaces. To be called again when it has come, or was made again. Raises SystemRefusedError."""
    if interface is None:
        ingress.open_to_all(listener.sock)
    else:
        _keep_to(listener.sock, listener.name, interface)


def close_all(listeners: list[Listener]) -> None:
    """Close every listener, and empty the list: what is still on it may be open, what is not is closed."""
    for listener in listeners:
        listener.close()
    listeners.clear()


def overlap(one: Endpoint, other: Endpoint) -> bool:
    """True if only one of them can be open at a time, or they are the same."""
    same_port = (one.family, one.port) == (other.family, other.port)
    return same_port and (one.host == other.host or bool({one.host, other.host} & {"0.0.0.0", "::"}))


def _refuse_overlap(wanted: Endpoint, kept: Sequence[Listener]) -> None:
    """A reload from one address to all of them, or back: the old listener is open until the new one is."""
    for listener in kept:
        there = listener.endpoint
        if overlap(there, wanted):
            raise SystemRefusedError(
                f"cannot listen on {wanted} while {there} is open, and it must be open until then: "
                "stop the relay and start it again"
            )


def _open_one(wanted: Endpoint, settings: Settings, tuning: Tuning) -> Listener | None:
    sock = _open(wanted, settings)
    if sock is None:
        return None
    if settings.interface:  # before it listens
        try:
            _keep_to(sock, str(wanted), settings.interface)
        except BaseException:
            sock.close()
            raise
    return _prepare(sock, tuning, wanted)


def _open(address: Endpoint, settings: Settings) -> socket.socket | None:
    """A bound socket; None for an IPv6 address that every host with IPv6 has, on one without."""
    try:
        sock = bound(address, settings.interface if _is_link_local(address) else None)
    except OSError as error:
        if error.filename is not None:
            raise SystemRefusedError(
                f"cannot listen on {address}: {error.filename} has that address, and there is no interface of that "
                "name (`ip link` lists them)"
            ) from error
        _pass_over_or_raise(address, error)
        return None
    try:
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


def bound(address: Endpoint, interface: str | None) -> socket.socket:
    """A socket bound to that address as a listener's is, before it is transparent: then it would take any address, a
    mistyped one too. Raises OSError, with `interface` as its filename if there is none of that name."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if address.host == "::1":  # each host has it, as soon as IPv6 is on
            sock.setsockopt(socket.SOL_IP, linux.IP_FREEBIND, 1)
        index = rtnetlink.index_of(interface) if interface else 0
        if interface and not index:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), interface)
        sock.bind((*address.sockaddr[:3], index) if index and _is_link_local(address) else address.sockaddr)
        return sock
    except BaseException:
        sock.close()
        raise


def _pass_over_or_raise(address: Endpoint, error: OSError) -> None:
    """A host without IPv6 gets a warning for the addresses that are in the default and in the file that is shipped; the
    rest is an error."""
    if address.host in ("::", "::1") and error.errno in _NO_IPV6:
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


def _is_link_local(address: Endpoint) -> bool:
    """The kernel binds a socket with such an address to the interface that has it."""
    return address.family == socket.AF_INET6 and ipaddress.ip_address(address.host).is_link_local


def _keep_to(sock: socket.socket, name: str, interface: str) -> None:
    index = rtnetlink.index_of(interface)
    try:
        ingress.keep_to(sock, index)
    except PermissionError as error:
        if index:
            raise SystemRefusedError(
                f"{name} is bound to an interface {interface} that was made again, and hears nobody: to bind it anew "
                "takes CAP_NET_RAW, which is missing; restart the relay"
            ) from error
        raise SystemRefusedError(
            f"no interface {interface!r} on this host (`ip link` lists them); to wait for it takes CAP_NET_ADMIN"
        ) from error
    except OSError as error:
        raise SystemRefusedError(f"{name} cannot be limited to interface {interface}: {error.strerror}") from error


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


def _adopt(fd: int, settings: Settings, stored: bool) -> socket.socket:
    """An inherited socket, once it has proven to be what we need."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise SystemRefusedError(f"inherited descriptor {fd} is not a socket ({error.strerror})") from error
    sock.set_inheritable(False)
    fault = _unfit(sock, settings.mode, stored)
    if fault:
        sock.detach()  # not to be closed: where LISTEN_FDS tells a lie it may be one of our own
        raise SystemRefusedError(f"inherited descriptor {fd} {fault}")
    return sock


def _make_fit(listener: Listener, settings: Settings) -> None:
    """One that a relay with other settings may have stored. Another one could not be opened: the store has this
    address."""
    if settings.mode == "tproxy" and not sockets.is_transparent(listener.sock):
        _make_transparent(listener.sock, listener.endpoint)
    if ingress.bound_to(listener.sock) and not _is_link_local(listener.wanted):  # by one that did not know better
        try:
            listener.sock.setsockopt(socket.SOL_SOCKET, linux.SO_BINDTOIFINDEX, 0)
        except PermissionError as error:
            raise CapabilityMissingError(
                f"cannot unbind {listener.name} from its interface: CAP_NET_RAW is missing; {HOW_TO_GIVE}"
            ) from error


def _unfit(sock: socket.socket, mode: Mode, stored: bool) -> str | None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        return "is not a TCP socket"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is not listening"
    if mode == "tproxy" and not stored and not sockets.is_transparent(sock):
        return "is not transparent: the kernel would give it no intercepted connection. Set `Transparent=yes`"
    return None


def _prepare(sock: socket.socket, tuning: Tuning, wanted: Endpoint) -> Listener:
    sock.setblocking(False)
    try:
        sockets.untune(sock)
        sockets.tune(sock, tuning)
        sock.listen(BACKLOG)
        return Listener(sock, wanted)
    except OSError as error:
        address = endpoint.from_sockaddr(sock.getsockname())
        sock.close()
        raise SystemRefusedError(f"cannot listen on {address}: {_remedy(address, error)}") from error


def backlog(listener: Listener) -> tuple[int, int]:
    """Connections that wait there for accept(), and how many may: none if it is closed."""
    return sockets.backlog(listener.sock) if listener.sock.fileno() >= 0 else (0, 0)
