"""Small facts: versions, lists of ports, masks, names of sysctls, sockets and who has them."""

import os
import socket

import pytest

from tproxy_relay.check import foreign_rules, host, limits, tools
from tproxy_relay.check.context import is_relay
from tproxy_relay.net import proc_net


@pytest.mark.parametrize(
    "text, expected",
    [
        ("nftables v1.0.6 (Lester Gooch #5)", (1, 0, 6)),
        ("nftables v0.9.0 (Fearless Fosdick)", (0, 9, 0)),
        ("nftables v1.1 (x)", (1, 1, 0)),
        ("", None),
    ],
)
def test_versions(text: str, expected: tuple[int, ...] | None) -> None:
    assert tools.version(text) == expected


def test_old_nft_is_older() -> None:
    assert (tools.version("v0.9.6") or ()) < tools.OLDEST_NFT <= (tools.version("v0.9.8") or ())


@pytest.mark.parametrize(
    "port, ranges, expected",
    [(80, "", False), (80, "80", True), (80, "22,79-81", True), (80, "22,81-90", False), (8080, "80,8080", True)],
)
def test_lists_of_ports(port: int, ranges: str, expected: bool) -> None:
    assert limits.in_list(port, ranges) is expected


@pytest.mark.parametrize("taken", [0, 0xE0000000, 0x0F000000, 0xFFFFFFF8, 0x55555550])
def test_a_free_mask_has_three_bits_of_nobody(taken: int) -> None:
    mask = foreign_rules.free_mask(taken)
    assert mask & taken == 0 and mask.bit_count() == (0 if taken == 0x55555550 and not mask else 3)


def test_no_mask_is_free_when_all_bits_are_taken() -> None:
    assert foreign_rules.free_mask(0xFFFFFFFE) == 0


def test_an_interface_with_a_dot_takes_slashes() -> None:
    assert host.of_interface(4, "eth0", "forwarding") == "net.ipv4.conf.eth0.forwarding"
    assert host.of_interface(6, "eth0.7", "forwarding") == "net/ipv6/conf/eth0.7/forwarding"


def test_sysctls_are_read() -> None:
    bounds = host.sysctl("net.ipv4.ip_local_port_range")
    assert bounds and len(bounds.split(" ")) == 2
    assert host.number("net.ipv4.ip_forward") in (0, 1)
    assert host.number("net/ipv4/conf/lo/rp_filter") is not None
    assert host.sysctl("net.ipv4.no_such_thing") is None


def test_a_listener_and_its_owner_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = (one for one in proc_net.tcp_sockets() if one.local_port == port)
        owner = host.owner(found.inode)
        assert found.listening and owner and owner[0] == os.getpid() and not is_relay((1, "nginx: master"))
    assert not [one for one in proc_net.tcp_sockets() if one.local_port == port and one.listening]


def test_more_threads_take_more_maps() -> None:
    assert limits.maps_for(1000) - limits.maps_for(0) == 4000


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/x/bin/python /usr/local/sbin/tproxy-relay run --ports 1", True),
        ("python3 -m tproxy_relay run", True),
        ("/root/tproxy-relay/.venv/bin/python -m pytest", False),
        ("nginx: master", False),
    ],
)
def test_a_relay_is_known_by_its_program(command: str, expected: bool) -> None:
    assert is_relay((1, command)) is expected
