"""To the server: with which socket, as whom, and what it means when that fails.

Leaves of the recipe in connection.py, which makes one attempt after the other and can be told to end in each.
"""

import errno
import socket
from typing import NamedTuple

from tproxy_relay.net import sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import PathTuning, Tuning
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import policy
from tproxy_relay.relay.policy import RefusedError

CAPACITY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of socket(2) that are about this process or this host, and not about the server."""
NO_PORT = frozenset({errno.EADDRNOTAVAIL, errno.EADDRINUSE})
"""Errors of bind(2) and connect(2) after which another source may still do."""
_UNREACHABLE = frozenset(
    {
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.EAFNOSUPPORT,
        errno.ENOPROTOOPT,
        errno.EPROTO,
        errno.EINVAL,
        errno.EACCES,  # a prohibit route, or a broadcast address
        errno.EPERM,  # a local firewall rule
    }
)
_OUTCOMES = (
    (Outcome.CONNECT_REFUSED, frozenset({errno.ECONNREFUSED, errno.ECONNRESET})),
    (Outcome.NO_LOCAL_PORT, NO_PORT),
    (Outcome.CONNECT_UNREACHABLE, _UNREACHABLE),
    (Outcome.OVER_LIMIT, CAPACITY),
)


class SocketTuning(NamedTuple):
    """What the sockets of all connections of a worker are set to."""

    upstream: Tuning
    """Of those that it opens; accepted ones inherit theirs from their listener."""
    to_client: PathTuning
    to_server: PathTuning


def open_socket(family: socket.AddressFamily, tuning: SocketTuning) -> socket.socket:
    """A socket that is to be connected to a server. Raises OSError."""
    sock = sockets.upstream_socket(family, tuning.upstream)
    try:
        sockets.tune(sock, tuning.to_server)
    except OSError:
        sock.close()
        raise
    return sock


def imitate(client: Endpoint, source: str, sock: socket.socket) -> None:
    """Have the server see the client's address, and with policy.FULL its port, too. Raises OSError."""
    try:
        sockets.bind_foreign(sock, client if source == policy.FULL else client.with_port(0))
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        # a client with a port below 1024, and we have no CAP_NET_BIND_SERVICE: any other port will do
        raise OSError(errno.EADDRNOTAVAIL, error.strerror) from error


def refusal(error: OSError, ordered: Outcome | None) -> RefusedError:
    """The outcome of a connect that failed with this error, and the kernel's words for it; or the outcome that was
    `ordered` meanwhile."""
    if ordered is not None:
        return RefusedError(ordered, "while connecting")
    if isinstance(error, TimeoutError):
        return RefusedError(Outcome.CONNECT_TIMEOUT, text_of(error))
    for outcome, numbers in _OUTCOMES:
        if error.errno in numbers:
            return RefusedError(outcome, text_of(error))
    return RefusedError(Outcome.INTERNAL_ERROR, text_of(error))


def text_of(error: OSError) -> str:
    """What an operator reads about an error: strerror(3), or whatever else it says."""
    return error.strerror or str(error)
