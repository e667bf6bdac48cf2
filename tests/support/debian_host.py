"""A host of the lab as a Debian machine on which packages come and go: this machine's files, on which whatever is
written there lies as a layer that ends with it.
"""

import hashlib
import os
import stat
from pathlib import Path
from typing import NamedTuple

from machine import Machine

from tproxy_relay.lab import Host

_MOUNTS = """\
set -e
cd "$1"
shift
mount --make-rprivate /
mount -t tmpfs none layer
mkdir layer/upper layer/work layer/given
cp given/* layer/given
mount -t overlay -o lowerdir=/,upperdir=layer/upper,workdir=layer/work none root
mount --bind layer root/mnt
mount --rbind /dev root/dev
mount --rbind /sys root/sys
mount -t proc none root/proc
mount -t tmpfs none root/run
mount -t tmpfs none root/tmp
cd root
exec chroot . "$@"
"""

_OTHERS = (
    "/var/lib/dpkg/",  # what is installed, and what was
    "/var/log/dpkg.log",
    "/var/log/alternatives.log",
    "/var/cache/man/",  # made anew when a package brings man pages
    "/var/cache/ldconfig/",
    "/var/lib/systemd/deb-systemd-helper",  # the folders of its notes, for all packages
    # useradd(8) and userdel(8): the last version of each, and their locks.
    *("/etc/passwd-", "/etc/group-", "/etc/shadow-", "/etc/gshadow-", "/etc/subuid-", "/etc/subgid-", "/etc/.pwd.lock"),
)
"""What programs of Debian note down for themselves."""


class Entry(NamedTuple):
    """What there is of one name."""

    mode: int
    uid: int
    gid: int
    content: str
    """Of a file its digest, of a link its target."""


class DebianHost(Machine):
    """In a `with`. What is in `given`, a folder, is in /mnt/given there; it has the python3 of Debian."""

    def __init__(self, host: Host, folder: Path) -> None:
        super().__init__(host, _MOUNTS, folder, "/usr/bin/python3")
        self._as_it_was: dict[str, Entry | None] = {}
        for name in ("layer", "root", "given"):
            (folder / name).mkdir()
        self.given = folder / "given"

    @property
    def root(self) -> Path:
        """Its files, as we see them."""
        return Path(f"/proc/{self.first}/root")

    def remember(self) -> None:
        """What differs from the files of this machine by now, so that only later changes count."""
        self._as_it_was = {name: self._now(name) for name in self._touched()}

    def changes(self) -> list[str]:
        """The names of all that is not as it was."""
        names = {*self._touched(), *self._as_it_was}
        return sorted(name for name in names if not name.startswith(_OTHERS) and self._now(name) != self._before(name))

    def _touched(self) -> list[str]:
        upper = self.root / "mnt/upper"
        found = []
        for folder, folders, files in os.walk(upper):
            found += [f"/{(Path(folder) / name).relative_to(upper)}" for name in (*folders, *files)]
        return found

    def _now(self, name: str) -> Entry | None:
        return entry(Path(f"{self.root}{name}"))

    def _before(self, name: str) -> Entry | None:
        return self._as_it_was[name] if name in self._as_it_was else entry(Path(name))


def entry(path: Path) -> Entry | None:
    """None if there is none."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    content = ""
    if stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(found.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    return Entry(found.st_mode, found.st_uid, found.st_gid, content)
