"""Whatever both ends do, and whenever: what arrives is what was sent, and a cut stream never looks like a whole one."""

import pytest
from schedules import play_all

from tproxy_relay.lab import Lab

pytestmark = pytest.mark.slow

SEED, COUNT = 1, 500


def test_random_schedules(fresh_lab: Lab) -> None:
    """The same ones at every run; schedules.py tries others, and more of them."""
    outcomes, size = play_all(fresh_lab, SEED, list(range(COUNT)))
    assert outcomes.total() == COUNT
    assert min(outcomes[name] for name in ("completed", "client-reset", "upstream-reset")) > COUNT / 10
    print(f"{size / 1e6:.0f} MB: {dict(outcomes)}")
