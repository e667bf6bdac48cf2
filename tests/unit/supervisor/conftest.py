"""What the tests of the supervisor share."""

from collections.abc import Iterator

import pytest
from hands import Hands


@pytest.fixture
def hands() -> Iterator[Hands]:
    made = Hands()
    try:
        yield made
    finally:
        made.close()
