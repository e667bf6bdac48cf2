"""Cases for the doctor's probes."""

from typing import Any

from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding
from tproxy_relay.intercept import plan
from tproxy_relay.settings import PortRange, Settings

PORT = PortRange(8000, 8000)


def case(**settings: Any) -> Case:
    """Inbound connections to port 8000 are to be intercepted, unless these settings say otherwise."""
    wanted = Settings(**{"intercept_inbound": (PORT,), **settings})
    return Case(wanted, plan.of_settings(wanted))


def levels(findings: list[Finding]) -> list[tuple[str, str]]:
    """What was looked at, and how it is."""
    return [(one.name, one.level) for one in findings]
