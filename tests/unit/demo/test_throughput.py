"""The measurement of one connection, between the hosts of a lab and without a relay."""

import pytest

from tproxy_relay.demo import throughput
from tproxy_relay.demo.throughput import Measured
from tproxy_relay.lab import Lab
from tproxy_relay.net.endpoint import Endpoint


def test_the_rate_is_in_decimal_bits() -> None:
    nobody = Endpoint("192.0.2.1", 1)
    assert Measured(nobody, nobody, nobody, bytes=250_000_000, seconds=2.0).gbit_per_second == 1.0


def test_a_transfer_is_measured_where_it_arrives(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "SECONDS", 0.2)
    measured = throughput.measure(lab, 8001)
    assert measured.asked_for == Endpoint(lab.server.ipv4, 8001)
    assert measured.seen == measured.name and measured.name.host == lab.client.ipv4
    assert measured.bytes > 1 << 20 and measured.seconds > 0.1 and measured.gbit_per_second > 0
