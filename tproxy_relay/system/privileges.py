"""Which Linux capabilities each process of the relay has, and how it comes to have no others.

util-linux's setpriv(1) does it: it changes what it was told to, and becomes the program that follows.
"""

import os
import pwd
import shutil
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from typing import NamedTuple

from tproxy_relay.errors import CapabilityMissingError, ConfigError, SystemRefusedError

NUMBERS: Mapping[str, int] = {
    "dac_override": 1,
    "kill": 5,
    "setgid": 6,
    "setuid": 7,
    "setpcap": 8,
    "net_bind_service": 10,
    "net_admin": 12,
    "net_raw": 13,
    "sys_admin": 21,
}
"""linux/capability.h: the bits of those that the relay or its self-test has a use for, by setpriv's names."""

SUPERVISOR = (
    "net_raw",  # transparent listeners, SO_MARK, SO_BINDTODEVICE
    "net_admin",  # the ruleset
    "net_bind_service",  # listeners on ports below 1024
    "setuid",  # workers of another account
    "setgid",
    "setpcap",  # workers that cannot regain anything
    "kill",  # workers of another account that have stalled
    "dac_override",  # a log file or a configuration that belongs to another account
)
"""What a supervisor that is started as root keeps, and what for."""

_NOBODY = 2**32 - 1
"""(uid_t) -1, which chown(2) and its like take for "no change"; numbers beyond it do not fit into 32 bits."""

_SHED = "_TPROXY_RELAY_SHED"
"""In the environment: capabilities have been given up already, whatever that has brought about."""


class Held(NamedTuple):
    """Capability sets of this process, as bits (capabilities(7))."""

    effective: int
    bounding: int

    def has(self, name: str) -> bool:
        """True if it may use that capability."""
        return bool(self.effective >> NUMBERS[name] & 1)


class Account(NamedTuple):
    """The user and the group that a worker runs as."""

    uid: int
    gid: int
    known: bool
    """False for a number that no account has: it is in no group."""


def held() -> Held:
    """The capability sets of this process (proc(5), /proc/self/status). Raises OSError without /proc."""
    sets = {}
    with open("/proc/self/status", encoding="ascii") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name in ("CapEff", "CapBnd"):
                sets[name] = int(value, 16)
    return Held(sets["CapEff"], sets["CapBnd"])


def account(user: str) -> Account:
    """The account of that name or number. ConfigError if there is none of that name, or cannot be one."""
    if user.isdigit() and int(user) >= _NOBODY:
        raise ConfigError(f"user: {user} is not the number of an account")
    try:
        found = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError as error:
        if user.isdigit():
            return Account(int(user), int(user), False)
        raise ConfigError(f"user: there is no account {user!r} on this host") from error
    return Account(found.pw_uid, found.pw_gid, True)


def may_become(runs_as: Account) -> bool:
    """True if workers can be of that account: put into it, and killed in it."""
    mine = held()
    return _is_us(runs_as) or all(mine.has(name) for name in ("setuid", "setgid", "kill"))


def not_mapped(runs_as: Account) -> str:
    """Why that account cannot be had in this user namespace (user_namespaces(7)), whatever the capabilities are: '' if
    it can, else a clause that names the file with the reason."""
    if _is_us(runs_as):
        return ""
    for word, number, file in (("account", runs_as.uid, "uid_map"), ("group", runs_as.gid, "gid_map")):
        if not any(first <= number < first + count for first, count in _mapped(file)):
            return f"{word} number {number} is not mapped in this user namespace (/proc/self/{file})"
    if _text_of("setgroups") == "deny":
        return "groups may not be changed in this user namespace (/proc/self/setgroups)"
    return ""


def _mapped(file: str) -> list[tuple[int, int]]:
    """The first number and the length of each range; one for all numbers where the kernel has no such file."""
    ranges = [line.split() for line in _text_of(file).splitlines()]
    return [(int(first), int(count)) for first, _, count in ranges] or [(0, _NOBODY)]


def _text_of(name: str) -> str:
    try:
        with open(f"/proc/self/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def _is_us(one: Account) -> bool:
    return (one.uid, one.gid) == (os.geteuid(), os.getegid())


def for_worker(runs_as: Account | None, keep: Iterable[str]) -> list[str]:
    """The command that becomes the command after it, as that account (None: this one), with no capability but those,
    and with no way to more. It dies with its parent.

    Raises CapabilityMissingError if this process may not change its account, or not to that one here,
    SystemRefusedError without setpriv.
    """
    mine, changes = held(), ["-all", *(f"+{name}" for name in keep)]
    command = [_setpriv(), "--no-new-privs", "--pdeathsig", "KILL"]
    if runs_as is not None and not _is_us(runs_as):
        if not may_become(runs_as):
            raise CapabilityMissingError(
                f"user: workers of account number {runs_as.uid} take CAP_SETUID, CAP_SETGID and CAP_KILL: start it as "
                "root, or as that account"
            )
        if reason := not_mapped(runs_as):
            raise CapabilityMissingError(
                f"user: {reason}: have it mapped (newuidmap(1), `unshare --map-auto`, a container's userns), or leave "
                "`user` out"
            )
        groups = "--init-groups" if runs_as.known else "--clear-groups"
        command += ["--reuid", str(runs_as.uid), "--regid", str(runs_as.gid), groups]
    if mine.has("setpcap"):
        command.append(f"--bounding-set={','.join(changes)}")
    listed = ",".join(changes)
    return [*command, f"--inh-caps={listed}", f"--ambient-caps={listed}", "--"]


def shed(environ: MutableMapping[str, str]) -> None:
    """Start this program again without the capabilities of root that it has no use for. Returns if it has none of
    those, or cannot give them up."""
    mine = held()
    needed = sum(1 << NUMBERS[name] for name in SUPERVISOR)
    if environ.pop(_SHED, None) or os.geteuid() or not mine.has("setpcap") or not mine.bounding & ~needed:
        return
    listed = ",".join(["-all", *(f"+{name}" for name in SUPERVISOR if mine.bounding >> NUMBERS[name] & 1)])
    command = [_setpriv(), f"--bounding-set={listed}", f"--inh-caps={listed}", "--", *_this_command()]
    os.execve(command[0], command, {**environ, _SHED: "1"})


def _this_command() -> list[str]:
    """The same process once more."""
    return [sys.executable, *sys.orig_argv[1:]]


def _setpriv() -> str:
    found = shutil.which("setpriv", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise SystemRefusedError(
            "there is no setpriv here, by which workers give up their privileges: install util-linux"
        )
    return found
