"""What the lab needs of this machine, and the one line that says how to get what is missing."""

import os
from pathlib import Path

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs

TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "nft": "nftables"}
"""Program to package; the names of the packages are the same on all distributions that we know."""

_CAP_NET_ADMIN = 1 << 12
_CAP_SYS_ADMIN = 1 << 21
"""linux/capability.h: making and wiring network namespaces without a user namespace takes both."""

_USER_NAMESPACE_SWITCHES = (
    ("user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
    ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)
"""File under /proc/sys, the value that forbids, the setting that allows."""

SYSCTLS = Path("/proc/sys")


class LabError(RelayError):
    """The lab could not be built, or a program in it did not do what it was asked to."""


def require_tools() -> None:
    """LabError unless the programs and the protocols that the lab is made of are here."""
    missing = [tool for tool in TOOLS if programs.find(tool) is None]
    if missing:
        packages = " ".join(sorted({TOOLS[tool] for tool in missing}))
        raise LabError(f"the network lab needs {' and '.join(missing)}: apt-get install {packages}")
    if not os.path.exists("/proc/sys/net/ipv6"):
        raise LabError("the network lab needs IPv6 in the kernel: boot without ipv6.disable=1")


def privileged() -> bool:
    """True if this process may make network namespaces as it is, without a user namespace."""
    wanted = _CAP_SYS_ADMIN | _CAP_NET_ADMIN
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        effective = next((line.split()[1] for line in status if line.startswith("CapEff:")), "0")
    return int(effective, 16) & wanted == wanted


def no_namespace(said: str) -> LabError:
    """The error for an `unshare` that failed, `said` being its own words."""
    for name, forbidding, remedy in _USER_NAMESPACE_SWITCHES:
        if _read(name) == forbidding:
            allow = f"allow user namespaces: sysctl -w {remedy}"
            break
    else:
        allow = "where user namespaces are allowed (docker run --privileged)"
    return LabError(f"no network lab ({said}): run it as root, or {allow}")


def _read(name: str) -> str:
    try:
        return (SYSCTLS / name).read_text("ascii").strip()
    except OSError:
        return ""
