"""Three minutes of connections, some of them cut: nothing grows, nothing is lost, nothing is complained of."""

import pytest
import rows
from soak import run_soak

from tproxy_relay.lab import Lab

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MINUTES, RATE, SEED = 3, 100, 1


@pytest.mark.row(
    "L6",
    "100 connections a second of 0 B to 10 MB for 3 minutes: 5 % reset by clients, 5 % by servers, 5 % half-closed",
    "no descriptor and less than 3 MiB more; accepted = closed + active at every look; no warning in the log",
)
def test_nothing_grows(fresh_lab: Lab, seen: rows.Seen) -> None:
    faults = run_soak(fresh_lab, MINUTES, RATE, SEED, report=print)
    assert not faults, "\n".join(faults)
    seen("no descriptor more, less than 3 MiB more, every count right at every look, no warning")
