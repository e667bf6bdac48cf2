"""How the relay is to work: one frozen value, and nothing else knows where it came from.

config/loader.py makes it, and a worker gets it as JSON from its supervisor. Everything else reads it and nothing
changes it. Times are in seconds. 0 turns a timeout or a cap off, unless the field says otherwise.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

INTERFACE_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,15}")
"""linux/if.h: IFNAMSIZ is 16 with the final zero. What the kernel would allow beside these is not worth a quote."""

KERNEL_ROUTE_TABLES = (253, 254, 255)
"""rtnetlink(7): the tables default, main and local."""

MAX_ROUTE_PRIORITY = 32763
"""ip-rule(8): the rule for the main table has 32766, and three are needed below it."""

# The words that an option may have. options.py takes them from here, in this order.
Mode = Literal["tproxy", "redirect"]
OnFailure = Literal["open", "closed"]
PreserveSource = Literal["no", "address", "full"]
WhenFull = Literal["wait", "refuse", "evict"]
BackendName = Literal["auto", "nft", "iptables", "iptables-nft", "iptables-legacy"]
CpuAffinity = Literal["auto", "on", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]


class HostPort(NamedTuple):
    """A host, by name or address, and a TCP port, as the user wrote them."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class PortRange(NamedTuple):
    """TCP ports from the first to the last, both included."""

    first: int
    last: int

    def covers(self, port: int) -> bool:
        """True if the port is one of them."""
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class Network(NamedTuple):
    """Addresses, and some of their ports (None: all), as relay/acl.py matches them."""

    address: str
    """With the length of its prefix: 192.0.2.0/24."""
    ports: PortRange | None = None

    def __str__(self) -> str:
        whole = "/128" if ":" in self.address else "/32"
        address = self.address.removesuffix(whole)
        if self.ports is None:
            return address
        return f"[{address}]:{self.ports}" if ":" in address else f"{address}:{self.ports}"


@dataclass(frozen=True)
class Settings:
    """Every setting with its default. The meaning of each is in options.OPTIONS, once."""

    ports: tuple[int, ...] = (15002, 15006)
    bind: tuple[str, ...] = ("0.0.0.0", "::")
    interface: str | None = None
    mode: Mode = "tproxy"
    intercept_inbound: tuple[PortRange, ...] = ()
    intercept_outbound: tuple[PortRange, ...] = ()
    inbound_port: int = 15006
    outbound_port: int = 15002
    backend: BackendName = "auto"
    on_failure: OnFailure = "open"
    user: str | None = None
    """The account of the workers. None: that of the supervisor."""
    workers: int | None = None
    """None: as many as there are processors."""
    cpu_affinity: CpuAffinity = "auto"
    stall_timeout: float = 10.0
    self_probe: float = 600.0
    preserve_source: PreserveSource = "no"
    target: HostPort | None = None
    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()
    max_connections: int | None = None
    """None: as many as the descriptor limit allows."""
    max_per_source: int = 0
    max_rate_per_source: int = 0
    """New connections a second."""
    when_full: WhenFull = "wait"
    connect_timeout: float = 10.0
    idle_timeout: float = 0.0
    half_close_timeout: float = 0.0
    drain_timeout: float = 30.0
    """0 means: do not wait."""
    keepalive: int = 60
    user_timeout: float = 0.0
    client_congestion: str | None = None
    upstream_congestion: str | None = None
    """None: the kernel's default."""
    client_pacing: int = 0
    upstream_pacing: int = 0
    """Bytes a second."""
    socket_buffer: int = 0
    """Bytes; 0: the kernel decides."""
    mark_mask: int = 0x07000000
    """Three bits of the fwmark; the highest of them marks the relay's own sockets."""
    route_table: int = 7006
    route_priority: int = 7006
    log_level: LogLevel = "debug"
    log_format: LogFormat = "console"
    log_file: str | None = None
    """None: standard error."""
    admin: HostPort | str | None = None
    """A loopback address or the path of a unix socket; None: only the relay's own socket."""

    def to_json(self) -> dict[str, Any]:
        """Every field by its name, as values that json.dumps() takes; from_json() reads what comes of them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that to_json() has described, after json.loads(). Raises KeyError if a field of several values
        is missing, TypeError for an unknown one."""
        target, admin = values["target"], values["admin"]
        return cls(
            **{
                **values,
                "ports": tuple(values["ports"]),
                "bind": tuple(values["bind"]),
                "intercept_inbound": tuple(PortRange(*ports) for ports in values["intercept_inbound"]),
                "intercept_outbound": tuple(PortRange(*ports) for ports in values["intercept_outbound"]),
                "target": None if target is None else HostPort(*target),
                "admin": HostPort(*admin) if isinstance(admin, list) else admin,
                "allow": tuple(map(_network, values["allow"])),
                "deny": tuple(map(_network, values["deny"])),
            }
        )


def _network(values: Sequence[Any]) -> Network:
    address, ports = values
    return Network(address, None if ports is None else PortRange(*ports))
