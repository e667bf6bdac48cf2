"""One host of the lab, as its maker holds it: open sockets there, run programs there, set sysctls there.

Behind each host is one process (agent.py) in a network namespace of its own. The namespace has no name and
no mount: it lives as long as the agent, and the agent as long as the maker's end of the control socket.
"""

import contextlib
import json
import os
import shlex
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from socket import AF_INET, AF_INET6, SOCK_STREAM
from typing import IO, Any

from tproxy_relay.intercept import programs
from tproxy_relay.lab import agent, needs
from tproxy_relay.lab.needs import LabError

START_TIMEOUT = 10.0
"""Seconds for an agent to say that it lives; it takes some 30 ms."""
STOP_TIMEOUT = 10.0
RUN_TIMEOUT = 30.0

_DESCRIPTOR = struct.Struct("@i")
"""What SCM_RIGHTS carries (unix(7)): an int for each descriptor."""

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
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_TIMEOUT)
        reader, self._presence = os.pipe()
        with theirs, os.fdopen(reader):
            # -S: no site-packages; -I: nothing of the user's environment.
            command = [*enter, sys.executable, "-I", "-S", agent.__file__, str(theirs.fileno()), str(reader)]
            self._agent = _spawn(command, pass_fds=(theirs.fileno(), reader), stderr=subprocess.PIPE)

    def await_ready(self) -> "Host":
        """Wait for the namespace to exist; LabError with the remedy if it could not be made."""
        if not _receive(self._control):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._agent.wait(START_TIMEOUT)
            assert self._agent.stderr is not None
            said = self._agent.stderr.read().decode(errors="replace").strip()
            raise needs.no_namespace(said.splitlines()[-1] if said else "unshare failed silently")
        return self

    @property
    def pid(self) -> int:
        """A process in the namespace, for nsenter and /proc/PID/ns; it lives as long as the host."""
        return self._agent.pid

    def address(self, family: int = AF_INET) -> str:
        """Its address of that family."""
        return self.ipv6 if family == AF_INET6 else self.ipv4

    # Sockets.

    def socket(self, family: int = AF_INET, kind: int = SOCK_STREAM, protocol: int = 0) -> Socket:
        """An ordinary socket object, for use right here, whose packets live in this host."""
        _, descriptor = self._ask("socket", int(family), int(kind), protocol)
        assert descriptor is not None
        return Socket(fileno=descriptor)

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
        command, kept = self.command(argv), (self._presence, *pass_fds)
        return _spawn(command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, pass_fds=kept)

    # Settings.

    def sysctl(self, name: str) -> str:
        """The value of a sysctl of this host, e.g. `net.ipv4.ip_forward`."""
        answer, _ = self._ask("read", _sysctl_path(name))
        return str(answer["text"]).strip()

    def set_sysctl(self, name: str, value: object) -> None:
        """Set a sysctl of this host; OSError if the kernel has none such or does not want the value."""
        self._ask("write", _sysctl_path(name), f"{value}\n")

    def close(self) -> None:
        """End it and everything in it; done when it is gone. May be called again."""
        self._control.close()
        if self._presence >= 0:
            os.close(self._presence)
            self._presence = -1
        try:
            self._agent.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._agent.kill()
            self._agent.wait()
        if self._agent.stderr is not None:
            self._agent.stderr.close()

    def _ask(self, *request: object) -> tuple[dict[str, Any], int | None]:
        with self._lock:
            try:
                self._control.send(json.dumps(request).encode())
                # Not socket.recv_fds(): it ignores its flags, and the descriptor would leak into children.
                message, ancillary, _, _ = self._control.recvmsg(
                    agent.MESSAGE_LIMIT, socket.CMSG_LEN(_DESCRIPTOR.size), socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise LabError(f"the {self.name} host of the lab is gone ({error})") from error
        if not message:
            raise LabError(f"the {self.name} host of the lab is gone")
        answer: dict[str, Any] = json.loads(message)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["error"], str(request[1]))
        return answer, _DESCRIPTOR.unpack(ancillary[0][2])[0] if ancillary else None


def _spawn(
    command: Sequence[str],
    *,
    stdin: File = subprocess.DEVNULL,
    stdout: File = subprocess.DEVNULL,
    stderr: File = None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=_environment() if env is None else env,
        pass_fds=pass_fds,
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": programs.search_path()}


def _receive(control: socket.socket) -> bytes:
    try:
        return control.recv(agent.MESSAGE_LIMIT)
    except OSError:
        return b""


def _sysctl_path(name: str) -> str:
    return "/proc/sys/" + name.replace(".", "/")


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Any:
    try:
        yield
    except BaseException:
        sock.close()
        raise
