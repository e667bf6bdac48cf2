"""Fixtures of the tests that send packets."""

import sys
from collections.abc import Callable

import pytest
from interception import BOTH_WAYS

from tproxy_relay.lab import Lab


@pytest.fixture
def rules() -> Callable[..., str]:
    """Call it to run `rules ACTION` in the relay's host; the answer. LabError if it fails."""

    def run(lab: Lab, action: str, *options: str) -> str:
        command = [sys.executable, "-m", "tproxy_relay", "rules", action, "--config", "/dev/null"]
        return lab.relay.run([*command, *BOTH_WAYS, *options]).stdout

    return run
