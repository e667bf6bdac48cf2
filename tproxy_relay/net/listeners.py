"""The listening sockets: opened here, or inherited from whoever started us.

What goes wrong with them goes wrong at start, in front of the operator, so each failure becomes one line that
says what and how to mend it, with an exit code of its own.
"""

import errno
import logging
import os
import socket
from collections.abc import MutableMapping, Sequence

from tproxy_relay.errors import CapabilityMissingError, KernelUnsupportedError, SystemRefusedError
from tproxy_relay.net import endpoint, sockets
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
    return None if sock is None else _prepare(sock, tuning, wanted)


def _open(address: Endpoint, settings: Settings) -> socket.socket | None:
    """A bound socket; None for an IPv6 address that every host with IPv6 has, on one without."""
    try:
        sock = bound(address, settings.interface)
    except OSError as error:
        if error.filename is not None:
            _refuse_interface(error)
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
    mistyped one too. Raises OSError, with `interface` as its filename if that is what it is about."""
    sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if interface:
            _bind_to_interface(sock, interface)
        sock.bind(address.sockaddr)
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


def _bind_to_interface(sock: socket.socket, interface: str) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode() + b"\0")
    except OSError as error:
        raise OSError(error.errno, error.strerror, interface) from error


def _refuse_interface(error: OSError) -> None:
    """In the user's words, what `_bind_to_interface` has raised. Returns if there are none for it."""
    interface = error.filename
    if error.errno == errno.ENODEV:
        raise SystemRefusedError(f"no interface {interface!r} on this host (`ip link` lists them)") from error
    if error.errno == errno.EPERM:
        raise CapabilityMissingError(
            f"cannot bind to {interface or 'all interfaces'}: CAP_NET_RAW is missing; {HOW_TO_GIVE}"
        ) from error


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
    if _interface_of(listener.sock) != (settings.interface or ""):
        try:
            _bind_to_interface(listener.sock, settings.interface or "")
        except OSError as error:
            _refuse_interface(error)
            raise


def _interface_of(sock: socket.socket) -> str:
    """The interface that it is bound to; '' for all (SO_BINDTODEVICE of socket(7))."""
    name = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)  # IFNAMSIZ of linux/if.h
    return name.rstrip(b"\0").decode()


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
