"""Interfaces by which clients come in, in a network of the test's own."""

import pytest
from doctor import case, levels

from tproxy_relay.check import interfaces
from tproxy_relay.intercept import programs

pytestmark = pytest.mark.usefixtures("network")

REDIRECT = {"mode": "redirect"}
OK = [("redirect", "ok")]


def unnumbered() -> None:
    programs.run("ip link add near type bridge".split())
    programs.run("ip link set near up".split())


def test_an_unnumbered_link_is_told() -> None:
    unnumbered()
    assert levels([*interfaces.probe_redirect_addresses(case(**REDIRECT))]) == OK, "nobody is to be found there"
    programs.run("ip route add 192.0.2.0/24 dev near".split())
    (found,) = interfaces.probe_redirect_addresses(case(**REDIRECT))
    assert (found.name, found.level) == ("redirect-ipv4", "warning") and "near" in found.what
    assert "--mode tproxy" in found.remedy
    assert not [*interfaces.probe_redirect_addresses(case())], "TPROXY needs no address"
    assert levels([*interfaces.probe_redirect_addresses(case(interface="other", **REDIRECT))]) == OK
    programs.run("ip addr add 198.51.100.1/32 dev near".split())
    assert levels([*interfaces.probe_redirect_addresses(case(**REDIRECT))]) == OK


def test_an_address_of_the_link_is_one() -> None:
    unnumbered()
    programs.run("ip addr add 169.254.1.1/16 dev near scope link".split())
    programs.run("ip route add 192.0.2.0/24 dev near".split())
    assert levels([*interfaces.probe_redirect_addresses(case(**REDIRECT))]) == OK
