"""One connection of the lab is measured."""

import pytest

from tproxy_relay.demo import throughput
from tproxy_relay.lab import Lab


def test_a_direct_connection(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0.05)
    measured = throughput.measure(lab, 9082)
    assert measured.seen == measured.name and measured.asked_for[:2] == (lab.server.ipv4, 9082)
    assert measured.bytes > 0 and measured.gbit_per_second == measured.bytes * 8 / measured.seconds / 1e9
