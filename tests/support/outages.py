"""A network that fails for a while: hosts of the lab that neither hear nor are heard, and what that ends."""

import contextlib
from collections.abc import Iterator

from tproxy_relay.lab import Host

_NOTHING = """
table inet outage {
    chain in { type filter hook prerouting priority -400; policy drop; }
    chain out { type filter hook output priority -400; policy drop; }
}
"""


def cut_off(host: Host) -> None:
    """From now on the host is suspended, or its switch is gone, as far as others can see."""
    host.run(["nft", "-f", "-"], input=_NOTHING)


def reconnect(host: Host) -> None:
    """It is back."""
    host.run(["nft", "delete", "table", "inet", "outage"])


@contextlib.contextmanager
def outage(host: Host) -> Iterator[None]:
    """While this lasts, the host is cut off."""
    cut_off(host)
    try:
        yield
    finally:
        reconnect(host)
