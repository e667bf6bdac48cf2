"""The tables of the legacy iptables, which report no changes and which a look would load: those that are in use."""

from collections.abc import Iterator, Sequence

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs

_SAVES = {"/proc/net/ip_tables_names": "iptables-legacy-save", "/proc/net/ip6_tables_names": "ip6tables-legacy-save"}
"""Where the kernel lists the tables that are in use, for root to read."""


def saved(*options: str, table: str = "") -> Iterator[Sequence[str]]:
    """What the save program of each family says with these options, in lines, if tables are in use there, or that
    table is; nothing for an account that may not look."""
    for names, program in _SAVES.items():
        try:
            with open(names, encoding="ascii") as file:
                tables = file.read().split()
            if table in tables or not table and tables:
                yield programs.run([program, *options], check=False).stdout.splitlines()
        except (OSError, RelayError):
            continue
