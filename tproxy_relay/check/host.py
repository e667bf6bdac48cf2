"""The facts about this host that several probes look at: each is asked for once, when it is first needed.

RelayError comes out of the questions that take a program which is missing or refuses.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tproxy_relay.intercept import nft_listing, programs
from tproxy_relay.intercept.plan import Family
from tproxy_relay.system import privileges

NET_ADMIN, NET_RAW, SYS_ADMIN = "net_admin", "net_raw", "sys_admin"
"""Capabilities, by the names of privileges.NUMBERS."""


@dataclass(frozen=True)
class Interface:
    """A network interface, as `ip address` tells of it."""

    name: str
    kind: str
    """veth, bridge, vrf ..., '' for hardware."""
    master: str | None
    up: bool
    addresses: tuple[str, ...]
    """Those that mean something beyond the link, with their prefix length."""
    bridge: dict[str, Any]
    """What `ip -details` says of a bridge, {} for all others."""
    families: frozenset[int] = frozenset()
    """Of all its addresses, those of the link too."""

    def has_any(self, family: Family) -> bool:
        """True if it has an address of that family, be it of the link only."""
        return family in self.families

    def has(self, family: Family) -> bool:
        """True if it has an address of that family."""
        return any((":" in address) == (family == 6) for address in self.addresses)


class Host:
    """The facts about this host, as the network namespace of this process has them."""

    @functools.cached_property
    def interfaces(self) -> list[Interface]:
        """Every network interface, lo too. Raises RelayError without `ip`."""
        return [_interface(one) for one in ask("ip", "-json", "-details", "address", "show")]

    @functools.cached_property
    def held(self) -> privileges.Held | None:
        """The capabilities of this process; None without /proc."""
        with contextlib.suppress(OSError):
            return privileges.held()
        return None

    def may(self, capability: str) -> bool:
        """True if this process has that capability: one of privileges.NUMBERS."""
        return self.held is not None and self.held.has(capability)

    @functools.cached_property
    def nft_ruleset(self) -> list[dict[str, Any]]:
        """Every object in nftables; nothing without nft."""
        if programs.find("nft") is None:
            return []
        return nft_listing.ruleset()

    @functools.cached_property
    def iptables_rules(self) -> list[tuple[str, str]]:
        """What each kind of iptables-save prints, with the name of its program (`ip6tables-legacy`)."""
        saved = []
        for family in ("iptables", "ip6tables"):
            named = [f"{family}{kind}" for kind in ("-nft", "-legacy") if programs.find(f"{family}{kind}-save")]
            for program in named or [family] * bool(programs.find(f"{family}-save")):
                saved.append((program, programs.run([f"{program}-save"]).stdout))
        return saved

    @functools.cache
    def rules_of_routing(self, family: Family) -> list[dict[str, Any]]:
        """`ip rule`, the first one first, with numbers for names."""
        return ask("ip", "-N", "-json", f"-{family}", "rule", "show")

    @functools.cache
    def routes(self, family: Family, table: str) -> list[dict[str, Any]]:
        """The routes of a table; nothing where there is none of that name."""
        return ask("ip", "-N", "-json", f"-{family}", "route", "show", "table", table)


def sysctl(name: str) -> str | None:
    """Its value, one blank between the parts of it; None if this kernel or this namespace has none such. With slashes
    in place of dots the name may have an interface with a dot in it."""
    path = name if "/" in name else name.replace(".", "/")
    text = _read(f"/proc/sys/{path}")
    return " ".join(text.split()) or None


def number(name: str) -> int | None:
    """The value of a sysctl as a whole number; None if there is none such, or if it is no number."""
    value = sysctl(name)
    return int(value) if value is not None and value.lstrip("-").isdigit() else None


def of_interface(family: Family, interface: str, leaf: str) -> str:
    """The name of a sysctl of one interface."""
    separator = "/" if "." in interface else "."
    return separator.join(["net", f"ipv{family}", "conf", interface, leaf])


def owner(inode: str) -> tuple[int, str] | None:
    """A process that has this socket, and its command line; None if it is hidden from us."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if f"socket:[{inode}]" in _descriptors(pid):
            return int(pid), " ".join(_read(f"/proc/{pid}/cmdline").split("\0")).strip()
    return None


def _descriptors(pid: str) -> Iterator[str]:
    """What the descriptors of a process are; nothing if it is gone, or not ours to look at."""
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for name in names:
        with contextlib.suppress(OSError):  # closed by now
            yield os.readlink(f"/proc/{pid}/fd/{name}")


def ask(*argv: str) -> list[dict[str, Any]]:
    """What a program answers in JSON; nothing where it says that there is no such thing."""
    done = programs.run(argv, check=False)
    try:
        answer = json.loads(done.stdout or "[]")
    except ValueError:
        return []
    return [one for one in answer if isinstance(one, dict) and one]


def _interface(one: dict[str, Any]) -> Interface:
    link = one.get("linkinfo", {})
    addresses = tuple(
        f"{address['local']}/{address['prefixlen']}"
        for address in one.get("addr_info", ())
        if address.get("scope") in ("global", "site") and "local" in address
    )
    kind = str(link.get("info_kind", ""))
    bridge = dict(link.get("info_data", {})) if kind == "bridge" else {}
    families = frozenset(6 if address.get("family") == "inet6" else 4 for address in one.get("addr_info", ()))
    return Interface(one["ifname"], kind, one.get("master"), "UP" in one.get("flags", ()), addresses, bridge, families)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
