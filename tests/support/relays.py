"""The relay as a real process on loopback, with a configuration file and a server behind it."""

import contextlib
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import loopback
from deadlines import PATIENCE, wait_until

from tproxy_relay.lab import RelayProcess

BOOT = 15.0
"""Seconds for what takes new worker processes."""


class ThisHost:
    """In the place of a host of the lab: the relay runs beside the test."""

    @staticmethod
    def start(
        argv: Sequence[str], *, stdout: int | None, stderr: int | None, env: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """As Host.start."""
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env, start_new_session=True
        )


class Relay:
    """A relay with a configuration file, a port of its own and a server behind it."""

    def __init__(self, folder: Path, *, wrapper: Sequence[str] = (), **settings: object) -> None:
        self._stack = ExitStack()
        self.server = self._stack.enter_context(loopback.listen())
        with loopback.listen() as free:
            self.port = free.getsockname()[1]
        self.file = folder / "relay.conf"
        self.given = {
            **{"mode": "redirect", "bind": "127.0.0.1", "ports": self.port, "workers": 1},
            **{"target": "127.0.0.1:{}".format(self.server.getsockname()[1])},
            **{"log-format": "json", "log-level": "debug"},
            **{name.replace("_", "-"): value for name, value in settings.items()},
        }
        self.configure()
        self.process = RelayProcess(ThisHost(), ("--config", str(self.file)), wrapper)  # type: ignore[arg-type]

    def configure(self, **changes: object) -> None:
        """Write the file again."""
        self.given |= {name.replace("_", "-"): value for name, value in changes.items()}
        draft = self.file.with_suffix(".new")  # a file that is half written would be another one
        draft.write_text("".join(f"{name} = {value}\n" for name, value in self.given.items()), encoding="utf-8")
        draft.rename(self.file)

    def __enter__(self) -> "Relay":
        try:
            self.process.__enter__()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.__exit__(kind, error, trace)
        self._stack.close()

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client and the server's end, relayed."""
        client = self._stack.enter_context(loopback.dial(("127.0.0.1", self.port)))
        name = str(client.getsockname()[1]).encode()
        client.sendall(name)
        while True:
            server = self._stack.enter_context(self.server.accept()[0])
            server.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                if server.recv(len(name)) == name:
                    return client, server
            server.close()  # of a client that has only looked whether anybody listens

    def said(self, message: str, count: int = 1, seconds: float = BOOT) -> list[dict[str, Any]]:
        """The lines with this message, once there are so many."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.process.lines() if line.get("message") == message]

        wait_until(lambda: len(found()) >= count, f"{count} x {message}: {self.process.log}", seconds)
        return found()

    def reload(self) -> None:
        """Ask for it."""
        self.process.signal(signal.SIGHUP)

    def holder(self, number: int) -> int:
        """The pid of the worker that has that connection: the first, second ... that was accepted and lives."""
        before = len([line for line in self.process.lines() if line.get("message") == "connections"])
        self.process.signal(signal.SIGUSR1)
        self.said("connections", before + 1)
        return int(str(self.said("connection live", number + 1)[number]["id"]).split("-")[0], 16)


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
