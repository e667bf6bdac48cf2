"""What the tests of the log share."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def root_logger_as_before() -> Iterator[None]:
    """A LogWriter takes the root logger over."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
