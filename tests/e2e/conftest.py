"""Fixtures of the tests that send packets."""

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doctors import Doctor, program_in
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


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the program `tproxy-relay`, for remedies."""
    return program_in(tmp_path_factory.mktemp("bin"))


@pytest.fixture
def doctor(fresh_lab: Lab, command: Path) -> Doctor:
    """`check` in the relay's host, and a shell for what it prints."""
    return Doctor(fresh_lab.relay, command)
