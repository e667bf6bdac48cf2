"""`tproxy-relay install` and `uninstall`: the files of a service, for a program that pip has installed.

A package of the distribution brings them itself. The files are those of etc/ in the source tree, which pip keeps in
share/tproxy-relay/etc of its environment.
"""

import contextlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tproxy_relay.cli.arguments import Arguments
from tproxy_relay.errors import RelayError, SystemRefusedError

PACKAGED = "/usr/sbin/tproxy-relay"
"""Where the files say that the program is."""

_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./+@:~-]+")
"""That needs no quotes, neither in a unit nor in a shell script."""
_HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")
"""systemd.exec(5), ProtectHome= and PrivateTmp=: the service does not see these."""
_BESIDE = ".dpkg-dist"
"""Of the name of our version, where another one is to stay. Who reads whole folders of /etc passes over these
(logrotate(8), tabooext)."""


class Target(NamedTuple):
    """One file of the service, and where on the machine it goes."""

    name: str
    """In etc/ of the source tree."""
    path: str
    """On the machine."""
    theirs: bool = False
    """True if it is the administrator's to change: then another version of it is left alone."""
    mode: int = 0o644


TARGETS = (
    Target("tproxy-relay.conf", "/etc/tproxy-relay.conf", theirs=True),
    Target("default/tproxy-relay", "/etc/default/tproxy-relay", theirs=True),
    Target("logrotate.d/tproxy-relay", "/etc/logrotate.d/tproxy-relay", theirs=True),
    Target("init.d/tproxy-relay", "/etc/init.d/tproxy-relay", theirs=True, mode=0o755),
    Target("sysusers.d/tproxy-relay.conf", "/etc/sysusers.d/tproxy-relay.conf", theirs=True),
    Target("sysctl.d/10-tproxy-relay.conf", "/etc/sysctl.d/10-tproxy-relay.conf", theirs=True),
    Target("tmpfiles.d/tproxy-relay.conf", "/etc/tmpfiles.d/tproxy-relay.conf", theirs=True),
    # systemd.unit(5): for what was not packaged; `systemctl edit` writes into /etc.
    Target("systemd/tproxy-relay.service", "/usr/local/lib/systemd/system/tproxy-relay.service"),
    Target("systemd/tproxy-relay.socket", "/usr/local/lib/systemd/system/tproxy-relay.socket"),
    Target("systemd/tproxy-relay.service.d/socket.conf", "/usr/local/share/doc/tproxy-relay/examples/socket.conf"),
    Target("prometheus/tproxy-relay.rules.yml", "/usr/local/share/doc/tproxy-relay/examples/tproxy-relay.rules.yml"),
    Target("grafana/tproxy-relay.json", "/usr/local/share/doc/tproxy-relay/examples/grafana.json"),
    Target("completion/tproxy-relay.bash", "/usr/local/share/bash-completion/completions/tproxy-relay"),
    Target("completion/_tproxy-relay", "/usr/local/share/zsh/site-functions/_tproxy-relay"),
)

_NEXT = """\
Next, with systemd:
    systemd-sysusers && systemctl daemon-reload
    systemctl enable --now tproxy-relay
or with the init script, on Debian:
    useradd --system --user-group --no-create-home --shell /usr/sbin/nologin tproxy-relay
    update-rc.d tproxy-relay defaults && service tproxy-relay start
"""


def run(arguments: Arguments) -> int:
    """Do what `arguments.command` says below `arguments.root`, with a line for each file. Raises RelayError."""
    os.umask(0o022)  # all of it is for everybody to read
    root, program = Path(arguments.root), _program()
    texts = {target: _text(target, program) for target in TARGETS}
    said = []
    try:
        for target, text in texts.items():
            path = root / target.path[1:]
            said.append((_install if arguments.command == "install" else _uninstall)(target, text, path))
    except OSError as error:
        raise SystemRefusedError(f"cannot write {error.filename}: {error.strerror}") from error
    print("".join(f"{line}\n" for line in said if line), end="")
    if arguments.command == "install":
        if program.startswith(_HIDDEN) or os.path.realpath(program).startswith(_HIDDEN):
            print(f"A service of systemd does not see {program}: install the program elsewhere, such as below /opt.")
        print(_NEXT, end="")
    return 0


def _install(target: Target, text: str, path: Path) -> str:
    """What was done, in a line."""
    found = _read(path)
    if found == text:
        _set(path, None, target.mode)
        return f"unchanged  {path}"
    if found is not None and target.theirs:
        fresh = path.with_name(path.name + _BESIDE)
        _set(fresh, text, target.mode)
        return f"kept       {path}: it is not as we would make it, see {fresh}"
    _set(path, text, target.mode)
    return f"{'installed' if found is None else 'updated':9}  {path}"


def _uninstall(target: Target, text: str, path: Path) -> str:
    """What was done, in a line; '' if there was nothing to do."""
    found = _read(path)
    path.with_name(path.name + _BESIDE).unlink(missing_ok=True)
    if found is None:
        return ""
    if found != text and target.theirs:
        return f"kept       {path}: it has been changed"
    path.unlink()
    for folder in path.parents:
        if "tproxy-relay" not in folder.parts:
            break
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()
    return f"removed    {path}"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None


def _set(path: Path, text: str | None, mode: int) -> None:
    """Whole or not at all; None: it has the text already."""
    if text is None:
        path.chmod(mode)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.chmod(mode)
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


def _text(target: Target, program: str) -> str:
    """What it is to hold, where the program is there."""
    text = (_source() / target.name).read_text(encoding="utf-8")
    if target.path == "/etc/default/tproxy-relay":
        return text.replace(f"#DAEMON={PACKAGED}", f"DAEMON={program}")
    return text.replace(PACKAGED, program) if target.name.startswith("systemd/") else text


def _source() -> Path:
    """etc/ of the source tree, or what pip has kept of it."""
    for folder in _sources():
        if (folder / TARGETS[0].name).is_file():
            return folder
    raise RelayError("the files of the service are not here: a package that has installed this program has them, too")


def _sources() -> Iterator[Path]:
    yield Path(__file__).parents[2] / "etc"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.distribution("tproxy-relay").files or ():
            if file.parts[-3:] == ("tproxy-relay", "etc", TARGETS[0].name):
                yield Path(str(file.locate())).parent


def _program() -> str:
    """The absolute name of the command that pip has made, by which a service can start it."""
    called = Path(shutil.which(sys.argv[0]) or sys.argv[0])
    beside = Path(sys.executable).parent / "tproxy-relay"
    program = os.path.abspath(called if called.name == "tproxy-relay" else beside)
    if not os.access(program, os.X_OK):
        raise RelayError(f"there is no program {program}: install it with pip first")
    if not _PLAIN_PATH.fullmatch(program):
        raise RelayError(f"a service cannot start {program!r}: install the program where the name is a plainer one")
    return program
