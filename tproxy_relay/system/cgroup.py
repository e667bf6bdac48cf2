"""What limits the control group of this process, and the groups around it (cgroups(7)). Both versions: many a host has
some controllers in the one and some in the other."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def texts(controller: str, *files: str) -> Iterator[str]:
    """What the files say, with a blank between, of our own group and of each one around it that has them."""
    for root, group in _groups(controller):
        folder = root / group.lstrip("/")
        for one in (folder, *folder.parents):
            if not one.is_relative_to(root):
                break
            try:
                yield " ".join((one / file).read_text("ascii").strip() for file in files)
            except (OSError, UnicodeError):
                pass  # the outermost one has no limits


def least(controller: str, file: str) -> int | None:
    """The smallest number in those files; None without a limit."""
    return min((int(text) for text in texts(controller, file) if text.isdigit()), default=None)


def _groups(controller: str) -> Iterator[tuple[Path, str]]:
    """The root of the hierarchy, and our group in it: of version 2, and of version 1."""
    try:
        lines = OWN_CGROUP.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield CGROUPS, group
        elif controller in controllers.split(","):
            yield CGROUPS / controller, group
