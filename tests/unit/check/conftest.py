"""What the tests of the doctor have in common."""

from collections.abc import Callable
from typing import NoReturn

import pytest

from tproxy_relay.lab import LabError, needs


@pytest.fixture
def possible(require_or_skip: Callable[[str], NoReturn]) -> None:
    """Skips, or fails in CI, where namespaces cannot be had."""
    try:
        needs.require_tools()
    except LabError as error:
        require_or_skip(str(error))
