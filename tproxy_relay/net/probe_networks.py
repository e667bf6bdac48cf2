"""The addresses between which the self-probe connects (check/selfprobe.py): of networks for documentation (RFC 5737,
RFC 3849), which no host has. So its connections are known by them.
"""

from tproxy_relay.net.endpoint import Endpoint

IPV4 = ("192.0.2", "198.51.100", "203.0.113")
"""The first one that this host has nothing of is taken; of that, the first eight addresses."""
IPV6 = "2001:db8:7006"
"""Two networks of 64 bits."""


def has_both(client: Endpoint, server: Endpoint) -> bool:
    """True for a connection of the self-probe, whoever's host it is on."""
    if ":" in client.host:
        return client.host.startswith(f"{IPV6}:") and server.host.startswith(f"{IPV6}:")
    network, _, number = client.host.rpartition(".")
    return network in IPV4 and len(number) == 1 and number < "8" and server.host in _near(network)


def _near(network: str) -> frozenset[str]:
    return frozenset(f"{network}.{number}" for number in range(8))
