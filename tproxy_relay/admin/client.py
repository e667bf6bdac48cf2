"""Asking a running relay, from another process."""

import http.client
import json
import os
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any

from tproxy_relay.admin import address
from tproxy_relay.admin.address import Where
from tproxy_relay.errors import CapabilityMissingError, RelayError, SystemRefusedError
from tproxy_relay.settings import Settings

ANSWER_TIMEOUT = 10.0
"""Seconds for an answer; it takes some milliseconds, and the workers of a busy relay may take three seconds."""


class NoRelayError(RelayError):
    """None runs here. The code is that of `status` in LSB 5.0, "Init Script Actions"."""

    exit_code = 3


class Client:
    """Of one relay, by its process id or by what its `admin` says."""

    def __init__(self, where: Where | int) -> None:
        self.where = where

    def get(self, path: str, query: Mapping[str, str] | None = None) -> Any:
        """The document at that path, read from JSON. Raises RelayError."""
        return self._ask("GET", path + (f"?{urllib.parse.urlencode(query)}" if query else ""))

    def abort(self, number: str) -> None:
        """Have the connection with that id aborted. Raises RelayError, also if there is none."""
        self._ask("DELETE", f"/sessions/{urllib.parse.quote(number)}")

    def _ask(self, method: str, target: str) -> Any:
        name = f"process {self.where}" if isinstance(self.where, int) else str(self.where)
        connection = _Connection(self.where)
        try:
            connection.request(method, target)
            answer = connection.getresponse()
            body = answer.read()
        except (PermissionError, ConnectionRefusedError, FileNotFoundError) as error:
            refused: type[RelayError] = CapabilityMissingError if isinstance(error, PermissionError) else NoRelayError
            raise refused(f"cannot ask the relay at {name}: {error.strerror}") from error
        except (OSError, http.client.HTTPException) as error:
            raise SystemRefusedError(f"the relay at {name} does not answer: {error}") from error
        finally:
            connection.close()
        if answer.status == 200:
            return json.loads(body)
        why = body.decode(errors="replace").strip()
        kind = CapabilityMissingError if answer.status == 403 else SystemRefusedError
        raise kind(f"the relay at {name} says: {why}")


class _Connection(http.client.HTTPConnection):
    def __init__(self, where: Where | int) -> None:
        super().__init__("localhost", timeout=ANSWER_TIMEOUT)
        self._where = where

    def connect(self) -> None:
        """Connect over whatever socket it is; `http.client` calls it."""
        self.sock: socket.socket = address.dial(self._where, ANSWER_TIMEOUT)


def find(settings: Settings) -> Client:
    """The relay of these settings: one in this network namespace that listens on one of these ports, or else the one
    that `admin` names. Raises RelayError."""
    refusal: RelayError | None = None
    draining = None
    for client in map(Client, address.running()):
        try:
            status = client.get("/status")
        except RelayError as error:
            refusal = error
            continue
        ports = {int(one["name"].rpartition(":")[2]) for one in status["listeners"]}
        if ports & set(settings.ports):
            if status["state"] in ("running", "reloading"):
                return client
            draining = client
    if draining is not None:
        return draining
    if settings.admin is not None:
        return Client(settings.admin)
    if refusal is not None:
        raise refusal
    ports_named = ", ".join(map(str, settings.ports))
    raise NoRelayError(f"no relay with ports {ports_named} runs in this network namespace{_hint()}")


def _hint() -> str:
    return "" if os.geteuid() == 0 else ", as far as this account may see"
