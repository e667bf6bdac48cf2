"""What a relay of the lab shows to an operator on its host, and connections to be seen there."""

import json
import socket
import sys
from typing import Any

from tproxy_relay.lab import Lab

PORT = 8000
ADMIN = 9106
PATIENCE = 10.0

Ends = tuple[socket.socket, socket.socket]
"""Of one connection: the client's, and the server's."""


def connect(lab: Lab, server: socket.socket) -> Ends:
    """One that is intercepted: the server sees the relay."""
    client = lab.client.connect(lab.server.ipv4, PORT, PATIENCE)
    served, peer = server.accept()
    served.settimeout(PATIENCE)
    assert peer[0] == lab.relay_address()
    return client, served


def client_name(ends: Ends) -> str:
    """ADDRESS:PORT, as the relay names the connection's client."""
    return "{}:{}".format(*ends[0].getsockname())


def close_all(*connections: Ends) -> None:
    """Both ends of each."""
    for ends in connections:
        for end in ends:
            end.close()


def program(lab: Lab, *words: str, code: int = 0, before: tuple[str, ...] = ()) -> str:
    """What `tproxy-relay WORDS` prints; `before` is a command that becomes it."""
    command = [*before, sys.executable, "-m", "tproxy_relay", *words, "--config", "/dev/null"]
    done = lab.relay.run(command, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return str(done.stdout or done.stderr)


def status(lab: Lab, code: int = 0) -> dict[str, Any]:
    """Of the relay that is there."""
    found: dict[str, Any] = json.loads(program(lab, "status", "--json", code=code))
    return found


def sessions(lab: Lab, show: str = "") -> list[dict[str, Any]]:
    """Its live connections."""
    document = json.loads(program(lab, "sessions", "--json", *(["--show", show] if show else [])))
    assert document["silent"] == []
    found: list[dict[str, Any]] = document["sessions"]
    return found


def fetch(lab: Lab, path: str, *options: str, port: int = ADMIN) -> tuple[int, str]:
    """Status and body, over TCP."""
    done = lab.relay.run(
        ["curl", "-s", "-w", "\n%{http_code}", *options, f"http://127.0.0.1:{port}{path}"], check=False
    )
    body, _, code = done.stdout.rpartition("\n")
    return int(code or 0), body.removesuffix("\n")
