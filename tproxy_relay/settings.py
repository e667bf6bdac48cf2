"""What the program was told to do: one frozen value, and nothing else knows where it came from.

config.py is the only maker of it outside the tests; everything below reads it and nothing changes it.
Times are in seconds. 0 turns a timeout or a cap off, unless the field says otherwise.
"""

from dataclasses import dataclass
from typing import NamedTuple


class HostPort(NamedTuple):
    """A host, by name or address, and a TCP port, as the user wrote them."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True)
class Settings:
    """Every setting with its default. The meaning of each is in options.OPTIONS, once."""

    command: str = "run"
    ports: tuple[int, ...] = (15002, 15006)
    bind: tuple[str, ...] = ("0.0.0.0", "::")
    interface: str | None = None
    mode: str = "tproxy"
    preserve_source: str = "no"
    target: HostPort | None = None
    max_connections: int | None = None
    """None: as many as the descriptor limit allows."""
    max_per_source: int = 0
    connect_timeout: float = 10.0
    idle_timeout: float = 0.0
    half_close_timeout: float = 0.0
    drain_timeout: float = 30.0
    """0 means: do not wait."""
    keepalive: int = 60
    user_timeout: float = 0.0
    mark_mask: int = 0x07000000
    """Three bits of the fwmark; the highest of them marks the relay's own sockets."""
    log_level: str = "debug"
    log_format: str = "console"
    log_file: str | None = None
    """None: standard error."""
    keep: bool = False
    """`demo` only: leave the network up until Ctrl-C."""
