"""What the guard notices of the host beside its own rules: that others have changed something, and how many connections
its rules have taken. What that means is for others to find out (supervisor/doctor.py).

Most changes are reported by the kernel (netlink.py). Those of the legacy iptables and of sysctls are not: so these are
read again and again, and compared.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable

from tproxy_relay.errors import RelayError
from tproxy_relay.guard import messages
from tproxy_relay.guard.netlink import Changes
from tproxy_relay.intercept import iptables_save, legacy_tables
from tproxy_relay.intercept.backend import Backend

LOOK_INTERVAL = 4.0
"""Seconds between two looks. One takes two or three programs, some milliseconds of a processor."""

_SYSCTLS = (
    *("net/ipv4/ip_forward", "net/ipv4/ip_nonlocal_bind", "net/ipv4/tcp_l3mdev_accept"),
    *("net/ipv6/conf/all/forwarding", "net/ipv6/ip_nonlocal_bind", "net/ipv6/conf/lo/disable_ipv6"),
    *("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"),
)
"""Those of the whole host that check/sysctls.py examines."""


class Surroundings:
    """To be asked at `look_at` at the latest, and told of changes that were heard of."""

    def __init__(self, changes: Changes, send: Callable[[messages.Event], None]) -> None:
        self._changes = changes
        self._send = send
        self._heard = False
        self._counted = messages.Counted()
        self._unreported = _unreported()
        self.look_at = time.monotonic() + LOOK_INTERVAL
        """When `look` is due (time.monotonic())."""

    def read(self) -> bool:
        """As that of Changes, and remembers the answer for `tell`."""
        changed = self._changes.read()
        self._heard = self._heard or changed
        return changed

    def tell(self) -> None:
        """Say that the host has changed, if it has; our own rules are as they should be by now."""
        if self._heard:
            self._heard = False
            self._send(messages.HostChanged())

    def look(self, backend: Backend) -> None:
        """Look at what nobody reports; say what is new."""
        self.look_at = time.monotonic() + LOOK_INTERVAL
        with contextlib.suppress(RelayError):
            before, self._unreported = self._unreported, _unreported()
            if before != self._unreported:
                self._heard = True
                self.tell()
            counted = count(backend)
            if counted != self._counted:
                self._counted = counted
                self._send(counted)


def count(backend: Backend) -> messages.Counted:
    """What the rules of that backend have taken. Raises RelayError."""
    taken = {"inbound": 0, "outbound": 0}
    for one in backend.counts():
        direction = one.label.partition(", IPv")[0]
        if direction in taken:
            taken[direction] += one.packets or 0
    return messages.Counted(**taken)


def _unreported() -> str:
    """A digest of the sysctls and of the legacy rules of others, without their counters."""
    lines = [f"{name} {_sysctl(name)}" for name in _SYSCTLS]
    lines += [_uncounted(line) for family in legacy_tables.saved() for line in family if _is_anothers(line)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sysctl(name: str) -> str:
    """'' where there is none such."""
    with contextlib.suppress(OSError), open(f"/proc/sys/{name}", encoding="ascii") as file:
        return file.read().strip()
    return ""


def _is_anothers(line: str) -> bool:
    return line[:1] in ("-", ":", "*") and iptables_save.PREFIX not in line


def _uncounted(line: str) -> str:
    return line.partition(" [")[0] if line.startswith(":") else line
