"""Where a relay can be asked: a socket of its own that only root and its account may use, and what `admin` names.

The first one has an abstract name (unix(7)) with the process id of the supervisor in it, which exists only in the same
network namespace, where the listeners are too.
"""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.net import unix_sockets
from tproxy_relay.settings import HostPort

NAME = "tproxy_relay/admin/"
"""Of the relay's own socket, an abstract name; the process id comes behind it."""
BACKLOG = 64
"""Connections that may wait for accept()."""
FOLDER_MODE, SOCKET_MODE = 0o750, 0o660
"""Whoever is in the group of the folder and of the socket may look."""


Where = HostPort | str
"""A loopback address, or the path of a unix socket."""


class AdminSocket:
    """A socket that listens for those who ask, and who may ask there."""

    def __init__(self, sock: socket.socket, where: Where | None, path: tuple[str, int] | None = None) -> None:
        """`where` is None for the relay's own; `path`: of the socket in the file system, and its inode."""
        self.sock = sock
        self.where = where
        self._path = path

    @property
    def is_tcp(self) -> bool:
        """Anybody on this host may ask there, and a browser in somebody else's name."""
        return isinstance(self.where, HostPort)

    def admits(self, sock: socket.socket) -> bool:
        """If whoever has connected there may look. For a socket in a folder, the permissions have said so."""
        return self.where is not None or self.permits(sock)

    def permits(self, sock: socket.socket) -> bool:
        """If whoever has connected there may change something: root, and the account of the relay."""
        return not self.is_tcp and unix_sockets.is_trusted(unix_sockets.peer(sock).uid)

    def close(self) -> None:
        """Listen no more. A path that is another relay's by now stays."""
        self.sock.close()
        if self._path is not None:
            path, inode = self._path
            with contextlib.suppress(OSError):
                if os.lstat(path).st_ino == inode:
                    os.unlink(path)


def own() -> AdminSocket:
    """The one that is always there. OSError if a process of another pid namespace has our number."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(unix_sockets.abstract(f"{NAME}{os.getpid()}"))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return AdminSocket(sock, None)


def listen(where: Where) -> AdminSocket:
    """A socket that listens there. Raises SystemRefusedError if it cannot, or if the path is somebody else's."""
    try:
        if isinstance(where, HostPort):
            return AdminSocket(_listen_tcp(where), where)
        return _listen_at(where)
    except OSError as error:
        raise SystemRefusedError(f"admin: cannot listen on {where}: {error.strerror or error}") from error


def _listen_tcp(where: HostPort) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(tuple(where))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_at(path: str) -> AdminSocket:
    """Under another name first: whoever looks there meanwhile meets the old socket or the new one."""
    folder = Path(path).parent
    with contextlib.suppress(FileExistsError):
        folder.mkdir(FOLDER_MODE)
    _refuse_what_is_there(path)
    # The path of a unix socket has at most 107 bytes (unix(7)), and this one must fit in, too.
    made = str(folder / f".{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)
        sock.bind(made)
        os.chmod(made, SOCKET_MODE)
        sock.listen(BACKLOG)  # before that nobody can connect
        inode = os.lstat(made).st_ino
        os.rename(made, path)
    except OSError:
        sock.close()
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise
    return AdminSocket(sock, path, (path, inode))


def _refuse_what_is_there(path: str) -> None:
    """A socket that nobody listens on any more is replaced; everything else is somebody's."""
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise SystemRefusedError(f"admin: {path} is there and is no socket: remove it, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return
        except BlockingIOError:
            pass  # its backlog is full
    raise SystemRefusedError(f"admin: {path}: another program listens there; name another path")


def running() -> list[int]:
    """Process ids of the relays in this network namespace (proc(5), /proc/net/unix): those of root and of our own
    account first, because anybody can take such a name."""
    return sorted(unix_sockets.numbered(NAME), key=lambda pid: (not _is_trusted(pid), pid))


def _is_trusted(pid: int) -> bool:
    try:
        return unix_sockets.is_trusted(os.stat(f"/proc/{pid}").st_uid)
    except OSError:
        return False


def dial(where: Where | int, timeout: float) -> socket.socket:
    """Connect to a relay, by its process id or to what its `admin` says; the socket has this timeout in
    seconds. Raises OSError; also for a stranger that has taken the name."""
    if isinstance(where, HostPort):
        return socket.create_connection((where.host, where.port), timeout)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(unix_sockets.abstract(f"{NAME}{where}") if isinstance(where, int) else where)
        if isinstance(where, int) and os.geteuid() and not unix_sockets.is_trusted(unix_sockets.peer(sock).uid):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError:
        sock.close()
        raise
    return sock
