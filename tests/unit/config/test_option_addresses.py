"""Addresses, networks and interfaces: what is taken, what it becomes, and what is refused in which words."""

import pytest
from written import reason

from tproxy_relay.config import option_addresses, option_types
from tproxy_relay.settings import HostPort, Network, PortRange


@pytest.mark.parametrize(
    "text, addresses",
    [
        ("0.0.0.0,::", ("0.0.0.0", "::")),
        ("127.0.0.1", ("127.0.0.1",)),
        ("2001:DB8:0::1 , 10.0.0.1", ("2001:db8::1", "10.0.0.1")),
        ("fe80::1", ("fe80::1",)),
    ],
)
def test_addresses_become_canonical(text: str, addresses: tuple[str, ...]) -> None:
    assert option_addresses.ADDRESSES.parse(text) == addresses


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "1.2.3",
        "127.1",
        "1.2.3.04",
        "256.0.0.1",
        "[::1]",
        "::1%lo",
        "fe80::1%eth0",
        "fe80::1%",
        "1.2.3.4/8",
        "::ffff:10.0.0.1",
        "224.0.0.1",
        "ff02::1",
        "255.255.255.255",
        "10.0.0.1,",
        "10.0.0.1,10.0.0.1",
        "::1,0:0::1",
        "١.2.3.4",
    ],
)
def test_what_is_no_list_of_addresses(text: str) -> None:
    assert reason(option_addresses.ADDRESSES, text)


@pytest.mark.parametrize("text", ["0.0.0.0,127.0.0.1", "::1,::", "0.0.0.0,::,10.0.0.1"])
def test_an_address_that_a_wildcard_already_holds_is_refused(text: str) -> None:
    assert "is already part of" in reason(option_addresses.ADDRESSES, text)


def test_an_ipv4_address_in_ipv6_clothes_is_sent_back_with_the_right_spelling() -> None:
    assert reason(option_addresses.ADDRESSES, "::ffff:10.0.0.1").endswith("write 10.0.0.1")


@pytest.mark.parametrize("text", ["eth0", "wg-home_1.2", "eth0:1", "a" * 15, "..."])
def test_interface(text: str) -> None:
    assert option_addresses.INTERFACE.parse(text) == text


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a" * 16, "eth 0", "eth0\n", "eth/0", 'eth0"; flush ruleset; #', "eté0", "a\0"]
)
def test_what_is_no_interface(text: str) -> None:
    assert reason(option_addresses.INTERFACE, text)


@pytest.mark.parametrize(
    "text, host, port",
    [
        ("192.0.2.1:443", "192.0.2.1", 443),
        ("[2001:DB8::0:1]:443", "2001:db8::1", 443),
        ("db-1.example.net:5432", "db-1.example.net", 5432),
        ("db.:1", "db.", 1),
        ("localhost:1", "localhost", 1),
        ("1st.example:1", "1st.example", 1),
    ],
)
def test_target(text: str, host: str, port: int) -> None:
    assert option_addresses.TARGET.parse(text) == HostPort(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":80",
        "host:",
        "host:0",
        "host:65536",
        "host:http",
        "host: 80",
        " host:80",
        "2001:db8::1:443",
        "[::1]",
        "[host]:1",
        "[fe80::1%eth0]:1",
        "[fe80::1]:1",
        "[10.0.0.1:1",
        "1.2.3:80",
        "127.1:80",
        "0x7f.1:80",
        "999.1.1.1:80",
        "0.0.0.0:80",
        "[::]:80",
        "224.0.0.1:80",
        "[::ffff:10.0.0.1]:80",
        "-a:80",
        "a-:80",
        "a..b:80",
        ".:80",
        "a" * 64 + ":80",
        "a." * 127 + "a:80",
        "é:80",
        "a b:80",
        "a/b:80",
        "user@host:80",
        "host:80\n",
    ],
)
def test_what_is_no_target(text: str) -> None:
    assert reason(option_addresses.TARGET, text)


@pytest.mark.parametrize(
    "text, networks",
    [
        ("", ()),
        ("10.0.0.0/8", (Network("10.0.0.0/8"),)),
        ("10.1.2.3", (Network("10.1.2.3/32"),)),
        ("10.1.2.3:443", (Network("10.1.2.3/32", PortRange(443, 443)),)),
        ("10.0.0.0/8:1-65535", (Network("10.0.0.0/8", PortRange(1, 65535)),)),
        ("0.0.0.0/0,::/0", (Network("0.0.0.0/0"), Network("::/0"))),
        ("2001:db8::1", (Network("2001:db8::1/128"),)),
        ("2001:DB8::/32 , [::1]:80", (Network("2001:db8::/32"), Network("::1/128", PortRange(80, 80)))),
        ("[2001:db8::/32]:8000-8100", (Network("2001:db8::/32", PortRange(8000, 8100)),)),
        ("[2001:db8::/32]", (Network("2001:db8::/32"),)),
        ("64:ff9b::10.0.0.1", (Network("64:ff9b::a00:1/128"),)),
        ("::/90", (Network("::/90"),)),
    ],
)
def test_networks(text: str, networks: tuple[Network, ...]) -> None:
    parsed = option_addresses.NETWORKS.parse(text)
    assert parsed == networks
    assert option_addresses.NETWORKS.parse(option_addresses.NETWORKS.write(parsed)) == parsed


@pytest.mark.parametrize(
    "text, why",
    [
        (",", "empty"),
        ("10.0.0.0/8,", "empty"),
        ("10.0.0.0/8,10.0.0.0/8", "10.0.0.0/8 is there twice"),
        ("10.0.0.1/8", "an address has bits behind its prefix; write 10.0.0.0/8"),
        ("2001:db8::1/32", "write 2001:db8::/32"),
        ("10.0.0.0/33", "not an IPv4 or IPv6 network"),
        ("2001:db8::/129", "not an IPv4 or IPv6 network"),
        ("10.0.0.0/255.0.0.0", "not a network"),
        ("10.0.0.0/08", "not a network"),
        ("10.0.0.0/", "not a network"),
        ("/8", "not a network"),
        ("10.0.0", "not an IPv4 or IPv6 network"),
        ("010.0.0.0/8", "not an IPv4 or IPv6 network"),
        ("example.org", "not a network"),
        ("localhost", "not a network"),
        ("fe80::1%eth0", "not a network"),
        ("::ffff:10.0.0.0/104", "an IPv4 network in disguise: write 10.0.0.0/8"),
        ("::ffff:10.0.0.1", "an IPv4 network in disguise: write 10.0.0.1/32"),
        ("10.0.0.0/8:", "'' is not a TCP port (1-65535) in '10.0.0.0/8:'"),
        ("10.0.0.0/8:0", "'0' is not a TCP port"),
        ("10.0.0.0/8:http", "'http' is not a TCP port"),
        ("10.0.0.0/8:90-80", "90-80 runs backwards: write 80-90 in '10.0.0.0/8:90-80'"),
        ("[2001:db8::/32]80", "not a network"),
        ("[10.0.0.0/8", "not a network"),
        ("[]:80", "not a network"),
        ("１0.0.0.0/8", "not a network"),
        ("10.0.0.0/８", "not a network"),
        ("10.0.0.0/8\n", "not a network"),
        ("10.0.0.0/8; accept", "not a network"),
        (",".join(f"10.0.0.{number}" for number in range(option_types.MAX_ITEMS + 1)), "65 items are too many"),
    ],
)
def test_what_are_no_networks(text: str, why: str) -> None:
    assert why in reason(option_addresses.NETWORKS, text)
