"""Cases for the doctor's probes."""

from typing import Any

import pytest

from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding
from tproxy_relay.intercept import plan
from tproxy_relay.lab import needs
from tproxy_relay.settings import PortRange, Settings

PORT = PortRange(8000, 8000)


USERS = [
    pytest.param(False, id="root", marks=pytest.mark.skipif(not needs.privileged(), reason="not root")),
    pytest.param(True, id="user namespace"),
]
"""Of whom a namespace is tried: whether it takes a user namespace."""


def case(**settings: Any) -> Case:
    """Inbound connections to port 8000 are to be intercepted, unless these settings say otherwise."""
    wanted = Settings(**{"intercept_inbound": (PORT,), **settings})
    return Case(wanted, plan.of_settings(wanted))


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    """What was looked at, and how it is."""
    return [(one.name, one.level) for one in findings]
