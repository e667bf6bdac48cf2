"""One host of the lab, as its maker holds it: open sockets there, run programs there, set sysctls there.

Behind each host is a network namespace of its own (net/namespace.py), which lives as long as its maker, with every
program in it.
"""

import contextlib
import os
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from socket import AF_INET, AF_INET6, SOCK_STREAM
from typing import IO, Any

from tproxy_relay.intercept import programs
from tproxy_relay.lab import needs
from tproxy_relay.lab.needs import LabError
from tproxy_relay.net.namespace import GoneError, NetworkNamespace, NoNamespaceError

RUN_TIMEOUT = 30.0

File = IO[Any] | int | None

Socket = socket.socket
"""Inside the class below, `socket` is its method."""


class Host:
    """A host: a network namespace with the programs and sockets in it.

    Safe to use from several threads. `ipv4` and `ipv6` are its addresses on the way to the others.
    """

    def __init__(self, name: str, ipv4: str, ipv6: str, enter: Sequence[str], *, user: bool) -> None:
        """Start it: `enter` is the command prefix that leads into the new namespace, `user` says whether a
        user namespace comes with it. `await_ready` is to be called before anything else."""
        self.name = name
        self.ipv4 = ipv4
        self.ipv6 = ipv6
        self._user = user
        reader, self._presence = os.pipe()
        with os.fdopen(reader):
            self._namespace = NetworkNamespace(enter, env=_environment(), presence=reader)

    def await_ready(self) -> "Host":
        """Wait for the namespace to exist; LabError with the remedy if it could not be made."""
        try:
            self._namespace.await_ready()
        except NoNamespaceError as error:
            raise needs.no_namespace(str(error) or "unshare failed silently") from error
        return self

    @property
    def pid(self) -> int:
        """A process in the namespace, for nsenter and /proc/PID/ns; it lives as long as the host."""
        return self._namespace.pid

    def address(self, family: int = AF_INET) -> str:
        """Its address of that family on the way to the other hosts, as text."""
        return self.ipv6 if family == AF_INET6 else self.ipv4

    # Sockets.

    def socket(self, family: int = AF_INET, kind: int = SOCK_STREAM, protocol: int = 0) -> Socket:
        """An ordinary socket object, for use right here, whose packets live in this host."""
        with self._reached():
            return self._namespace.socket(family, kind, protocol)

    def listen(self, port: int = 0, family: int = AF_INET, backlog: int = 128) -> Socket:
        """A TCP listener on all addresses of the host, of one family."""
        sock = self.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        with _closed_on_error(sock):
            sock.bind(("::" if family == AF_INET6 else "0.0.0.0", port))
            sock.listen(backlog)
        return sock

    def connect(self, address: str, port: int, timeout: float | None = 10.0) -> Socket:
        """A TCP connection from this host; the timeout stays on the socket."""
        sock = self.socket(AF_INET6 if ":" in address else AF_INET)
        with _closed_on_error(sock):
            sock.settimeout(timeout)
            sock.connect((address, port))
        return sock

    # Programs.

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` in this host, from anywhere on this machine by this user.

        nsenter becomes the program (it execs), so that the process id is the program's own.
        """
        return [*self.entrance(), "-n", "--", *argv]

    def entrance(self) -> list[str]:
        """The nsenter command, as far as all hosts of a lab have it in common: into the user namespace."""
        user = ["-U", "--preserve-credentials"] if self._user else []
        return ["nsenter", "-t", str(self.pid), *user]

    def run(
        self, argv: Sequence[str], *, input: str = "", check: bool = True, timeout: float = RUN_TIMEOUT
    ) -> "subprocess.CompletedProcess[str]":
        """Run a program to its end; LabError if it fails, unless `check` is off."""
        done = subprocess.run(
            self.command(argv),
            input=input,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=timeout,
            env=_environment(),
            pass_fds=(self._presence,),
            start_new_session=True,
        )
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip().replace("\n", "; ")
            raise LabError(f"{self.name}: {shlex.join(argv)} exited with {done.returncode}: {said}")
        return done

    def start(
        self,
        argv: Sequence[str],
        *,
        stdin: File = subprocess.DEVNULL,
        stdout: File = None,
        stderr: File = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> "subprocess.Popen[bytes]":
        """Start a program, in a session of its own: Ctrl-C is for the maker.

        It dies with the host at the latest.
        """
        return subprocess.Popen(
            self.command(argv),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=_environment() if env is None else env,
            pass_fds=(self._presence, *pass_fds),
            start_new_session=True,
        )

    # Settings.

    def sysctl(self, name: str) -> str:
        """The value of a sysctl of this host, e.g. `net.ipv4.ip_forward`."""
        with self._reached():
            return self._namespace.read(_sysctl_path(name)).strip()

    def set_sysctl(self, name: str, value: object) -> None:
        """Set a sysctl of this host; OSError if the kernel has none such or does not want the value."""
        with self._reached():
            self._namespace.write(_sysctl_path(name), f"{value}\n")

    def close(self) -> None:
        """End it and everything in it; done when it is gone. May be called again."""
        if self._presence >= 0:
            os.close(self._presence)
            self._presence = -1
        self._namespace.close()

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Around what the process in the namespace is asked for."""
        try:
            yield
        except GoneError as error:
            raise LabError(f"the {self.name} host of the lab is gone ({error})") from error


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": programs.search_path()}


def _sysctl_path(name: str) -> str:
    return "/proc/sys/" + name.replace(".", "/")


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Any:
    try:
        yield
    except BaseException:
        sock.close()
        raise
