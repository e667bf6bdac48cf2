"""Accounts for the relay and its workers: those that a test may name, and what lets them start the program.

Only root has other accounts than its own, and not in a user namespace of the lab, into which one user is mapped.
"""

import os
import pwd
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import configargparse

import tproxy_relay
from tproxy_relay.lab import needs

ACCOUNT, OTHER = "nobody", "daemon"
"""Two that every Linux has."""
NUMBER = "424242"
"""No account has it."""

_OPEN_DOORS = """\
[ -z "${NOTIFY_SOCKET-}" ] || { chmod 711 "${NOTIFY_SOCKET%/*}" && chmod 666 "$NOTIFY_SOCKET"; } || exit 1
cd / && mount -t tmpfs -o mode=755 none /mnt || exit 1
keep() { mkdir "/mnt/$1" && mount --rbind "$2" "/mnt/$1"; }
give() { mkdir -p "$2" && mount --rbind "/mnt/$1" "$2"; }
"""


def uid_of(account: str) -> int:
    """Its number."""
    return int(account) if account.isdigit() else pwd.getpwnam(account).pw_uid


def gid_of(account: str) -> int:
    """The number of its group."""
    return int(account) if account.isdigit() else pwd.getpwnam(account).pw_gid


def _all_mapped() -> bool:
    """True if they exist where we are (user_namespaces(7))."""
    ranges = [list(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    wanted = (uid_of(ACCOUNT), uid_of(OTHER), int(NUMBER))
    return all(any(first <= uid < first + count for first, _, count in ranges) for uid in wanted)


HAVE_ACCOUNTS = os.geteuid() == 0 and needs.privileged() and _all_mapped()


def becoming(account: str, *capabilities: str) -> tuple[str, ...]:
    """The command that becomes the one after it, as that account, with these ambient capabilities. With none, it can
    never have any."""
    listed = ",".join(("-all", *(f"+{name}" for name in capabilities)))
    numbers = ("--reuid", str(uid_of(account)), "--regid", str(gid_of(account)), "--clear-groups")
    bounding = () if capabilities else ("--bounding-set=-all",)
    return ("setpriv", *numbers, *bounding, f"--inh-caps={listed}", f"--ambient-caps={listed}", "--")


def for_all_accounts() -> tuple[str, ...]:
    """The command that becomes the one after it, where every account can read the program and notify its starter.

    The checkout or the interpreter may be below a folder that only root may enter, such as /root. In a mount
    namespace of its own there is another folder in that place, with nothing in it but these.
    """
    program = [Path(path).resolve() for path in _program()]
    closed = {door: [path for path in program if door in path.parents] for door in map(_first_closed, program) if door}
    script, behind = [_OPEN_DOORS], sorted({path for paths in closed.values() for path in paths})
    script += [f'keep {number} "{path}" || exit 1' for number, path in enumerate(behind)]
    script += [f'mount -t tmpfs -o mode=755 none "{door}" || exit 1' for door in closed]
    script += [f'give {number} "{path}" || exit 1' for number, path in enumerate(behind)]
    return ("unshare", "--mount", "sh", "-c", "\n".join([*script, 'exec "$@"']), "sh")


def _program() -> Iterator[str]:
    yield str(Path(tproxy_relay.__file__).parents[1])
    yield str(Path(configargparse.__file__).parent)
    yield from (sys.prefix, sys.base_prefix)


def _first_closed(path: Path) -> Path | None:
    """The folder on the way there that others may not enter."""
    return next((folder for folder in reversed(path.parents) if not folder.stat().st_mode & stat.S_IXOTH), None)
