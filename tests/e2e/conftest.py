"""Fixtures of the tests that send packets."""

import socket
import sys
from collections.abc import Callable, Iterator

import pytest
from interception import BOTH_WAYS, PORT

from tproxy_relay.lab import Lab


@pytest.fixture
def rules() -> Callable[..., str]:
    """Call it to run `rules ACTION` in the relay's host; the answer. LabError if it fails."""

    def run(lab: Lab, action: str, *options: str) -> str:
        command = [sys.executable, "-m", "tproxy_relay", "rules", action, "--config", "/dev/null"]
        return lab.relay.run([*command, *BOTH_WAYS, *options]).stdout

    return run


@pytest.fixture
def server(lab: Lab) -> Iterator[socket.socket]:
    """Listens in the server's host, on the port that clients are steered from."""
    with lab.server.listen(PORT) as listening:
        yield listening
