"""Whose connections are the self-probe's."""

import pytest

from tproxy_relay.net import probe_networks
from tproxy_relay.net.endpoint import Endpoint


@pytest.mark.parametrize(
    "client, server, of_probe",
    [
        ("192.0.2.2", "192.0.2.6", True),
        ("198.51.100.5", "198.51.100.6", True),
        ("192.0.2.2", "192.0.2.8", False),
        ("192.0.2.8", "192.0.2.2", False),
        ("192.0.2.16", "192.0.2.2", False),
        ("192.0.2.2", "198.51.100.6", False),
        ("10.1.1.2", "10.1.1.6", False),
        ("2001:db8:7006::2", "2001:db8:7006:1::2", True),
        ("2001:db8::2", "2001:db8:7006:1::2", False),
        ("2001:db8:7006::2", "2001:db8::2", False),
    ],
)
def test_both_ends_are_in_its_networks(client: str, server: str, of_probe: bool) -> None:
    assert probe_networks.has_both(Endpoint(client, 1), Endpoint(server, 8000)) is of_probe
