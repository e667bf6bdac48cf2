"""The fixture `relay` of the tests that want one in the lab, with clients steered to it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest

from tproxy_relay.lab import Lab, RelayProcess


def intercepting_relay(
    ports: Sequence[int | str], *options: str, scope: Literal["function", "module"] = "function"
) -> Callable[..., Any]:
    """A fixture, to be called `relay` in the module that wants it: the process, with connections to these ports of the
    server steered to it."""

    @pytest.fixture(scope=scope, name="relay")
    def started(lab: Lab) -> Iterator[RelayProcess]:
        lab.intercept(ports)
        with lab.relay_process(*options) as running:
            yield running
        lab.stop_intercepting()

    return started
