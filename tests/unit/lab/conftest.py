"""A lab for each kind of user: as we are, and in a user namespace, as somebody who is not root gets it."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest

from tproxy_relay.lab import Lab, LabError


@pytest.fixture(scope="module", params=[None, True], ids=["as-we-are", "user-namespace"])
def lab(request: pytest.FixtureRequest, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Lab]:
    """Client, relay and server, built once for the tests of a module."""
    with contextlib.ExitStack() as stack:
        try:
            built = stack.enter_context(Lab(user_namespace=request.param))
        except LabError as error:
            require_or_skip(str(error))
        yield built
