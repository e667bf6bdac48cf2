"""What the tests of the shared memory have in common."""

from collections.abc import Iterator

import pytest

from tproxy_relay.ipc.scoreboard import Scoreboard


@pytest.fixture
def scoreboard() -> Iterator[Scoreboard]:
    made = Scoreboard.create(100)
    yield made
    made.close()
