"""An address and a port, as one value that prints, compares and hashes the way people write it.

An IPv4 address that arrives mapped into IPv6 (`::ffff:192.0.2.1`, from a dual-stack socket) is the IPv4
address: everything above sees one spelling. Which address it is (client, original destination, upstream)
is said by the name of the variable that holds it.
"""

import socket
from typing import Any, NamedTuple

_MAPPED = "::ffff:"


class Endpoint(NamedTuple):
    """A numeric address, a TCP port, and for an IPv6 link-local address its interface."""

    host: str
    port: int
    scope_id: int = 0

    @property
    def family(self) -> socket.AddressFamily:
        """The family of a socket for it: AF_INET, or AF_INET6 for an address with colons."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    @property
    def sockaddr(self) -> tuple[Any, ...]:
        """The form that connect() and bind() take."""
        if ":" in self.host:
            return (self.host, self.port, 0, self.scope_id)
        return (self.host, self.port)

    def with_port(self, port: int) -> "Endpoint":
        """A copy with this port, and the same address and interface."""
        return self._replace(port=port)

    def __str__(self) -> str:
        if ":" not in self.host:
            return f"{self.host}:{self.port}"
        scope = f"%{self.scope_id}" if self.scope_id else ""
        return f"[{self.host}{scope}]:{self.port}"


def from_sockaddr(sockaddr: tuple[Any, ...]) -> Endpoint:
    """The endpoint in what accept(), getsockname() or getaddrinfo() of an INET socket returned."""
    host, port = sockaddr[0], sockaddr[1]
    if host.startswith(_MAPPED) and "." in host:
        return Endpoint(host[len(_MAPPED) :], port)
    return Endpoint(host, port, sockaddr[3] if len(sockaddr) > 3 else 0)
