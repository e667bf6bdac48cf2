"""What a service manager is to the relay: it opens the sockets of a socket unit and passes them on at each start, it
keeps the ones that the relay leaves with it (FDSTORE=1, as in sd_notify(3)), and hears of its states.

Run as a script it is the moment between the manager and the relay (sd_listen_fds(3)): `service_manager.py PATH COMMAND`
fetches the sockets from the manager that listens at PATH, and becomes the command.
"""

import fcntl
import json
import os
import select
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tproxy_relay.lab import Host

FIRST = 3
MOST = 100
"""Descriptors in one message."""


def main() -> None:
    """The script."""
    path, *command = sys.argv[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as manager:
        manager.connect(path)
        manager.send(os.environ["NOTIFY_SOCKET"].encode())
        message, descriptors, _, _ = socket.recv_fds(manager, 65536, MOST)
    order = json.loads(message)
    copies = [fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST + len(descriptors)) for fd in descriptors]
    for number, copy in enumerate(copies, FIRST):
        os.dup2(copy, number)
        os.close(copy)
    os.environ["NOTIFY_SOCKET"] = order["notify"]
    if copies:
        names = ":".join(order["names"])
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(copies)), LISTEN_FDNAMES=names)
    os.execvp(command[0], command)


class Kept(NamedTuple):
    """A socket that is passed on at the next start."""

    name: str
    sock: socket.socket

    @property
    def inode(self) -> int:
        return os.fstat(self.sock.fileno()).st_ino


class ServiceManager:
    """In a `with`; it listens in `folder`. Start the relay with `wrapper`."""

    def __init__(self, folder: Path) -> None:
        self.unit: list[Kept] = []
        """Sockets of a socket unit."""
        self.stored: list[Kept] = []
        """Those that were left here."""
        self.states: list[dict[str, str]] = []
        """What was told, in order, without what is about the store."""
        self._changed = threading.Condition()
        self._folder = folder
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(folder / "manager-notify"))
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(str(folder / "manager-door"))
        self._door.listen()
        self._bell, self._stop = socket.socketpair()
        self._pass_to: str | None = None
        self._thread = threading.Thread(target=self._serve, name="manager", daemon=True)

    def __enter__(self) -> "ServiceManager":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._thread.join()
        for kept in (*self.unit, *self.stored):
            kept.sock.close()
        for sock in (self._notify, self._door, self._bell):
            sock.close()

    @property
    def wrapper(self) -> tuple[str, ...]:
        """The command that becomes the command after it."""
        return (sys.executable, "-I", "-S", __file__, str(self._folder / "manager-door"))

    @property
    def names(self) -> list[str]:
        """Of what is in the store."""
        with self._changed:
            return sorted(kept.name for kept in self.stored)

    def listen(self, host: "Host", address: str, port: int) -> None:
        """Add a transparent listener of that host to the socket unit."""
        sock = host.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if ":" in address:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # IPV6_TRANSPARENT, IP_TRANSPARENT
        sock.setsockopt(*((socket.IPPROTO_IPV6, 75, 1) if ":" in address else (socket.SOL_IP, 19, 1)))
        sock.bind((address, port))
        sock.listen(4096)
        self.unit.append(Kept("", sock))

    def wait_for(self, state: str, count: int, patience: float = 10.0) -> list[dict[str, str]]:
        """All states, when one that has this name was told so often."""
        with self._changed:
            come = self._changed.wait_for(lambda: sum(state in one for one in self.states) >= count, patience)
            assert come, f"{state} was not told {count} times: {self.states}"
            return list(self.states)

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._bell, self._door, self._notify], [], [])
            if self._bell in ready:
                return
            if self._door in ready:
                self._pass_on()
            if self._notify in ready:
                self._hear()

    def _pass_on(self) -> None:
        asking, _ = self._door.accept()
        with asking, self._changed:
            self._pass_to = asking.recv(4096).decode()
            kept = [*self.unit, *self.stored]
            order = {"notify": str(self._folder / "manager-notify"), "names": [one.name for one in kept]}
            socket.send_fds(asking, [json.dumps(order).encode()], [one.sock.fileno() for one in kept])

    def _hear(self) -> None:
        data, descriptors, _, _ = socket.recv_fds(self._notify, 65536, MOST)
        told = dict(line.partition("=")[::2] for line in data.decode().splitlines())
        with self._changed:
            if told.get("FDSTORE") == "1":
                for fd in descriptors:
                    self._store(told["FDNAME"], socket.socket(fileno=fd))
            elif told.get("FDSTOREREMOVE") == "1":
                for kept in [one for one in self.stored if one.name == told["FDNAME"]]:
                    self.stored.remove(kept)
                    kept.sock.close()
            elif told.get("BARRIER") == "1":
                for fd in descriptors:
                    os.close(fd)  # all that was told before has been done
            elif "WATCHDOG" not in told:
                self.states.append(told)
            self._changed.notify_all()
        if "READY" in told and self._pass_to is not None:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                try:
                    sock.sendto(data, self._pass_to)
                except OSError:
                    self._pass_to = None  # nobody waits there any more

    def _store(self, name: str, sock: socket.socket) -> None:
        """One that is there already is not kept twice."""
        kept = Kept(name, sock)
        if kept.inode in [one.inode for one in self.stored]:
            sock.close()
        else:
            self.stored.append(kept)


if __name__ == "__main__":
    main()
