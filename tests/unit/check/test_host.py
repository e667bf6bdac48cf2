"""Facts about this host: settings of the kernel, interfaces, sockets and who has them, other people's rules."""

import os
import socket

import pytest

from tproxy_relay.check import host
from tproxy_relay.check.context import is_relay
from tproxy_relay.check.host import Host
from tproxy_relay.intercept import programs
from tproxy_relay.net import proc_net


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


@pytest.mark.usefixtures("network")
def test_interfaces_as_ip_tells_of_them() -> None:
    programs.run("ip link add one type veth peer name other".split())
    programs.run("ip addr add 192.0.2.1/24 dev one".split())
    programs.run("ip link set one up".split())
    found = {one.name: one for one in Host().interfaces}
    assert set(found) == {"lo", "one", "other"} and found["lo"].up and not found["other"].up
    assert found["one"].kind == "veth" and found["one"].addresses == ("192.0.2.1/24",)
    assert found["one"].has(4) and not found["one"].has(6) and not found["lo"].has(4), "a host's own address"


@pytest.mark.usefixtures("network")
def test_rules_of_routing_and_routes() -> None:
    programs.run("ip rule add pref 9 fwmark 1 lookup 99".split())
    programs.run("ip route add 192.0.2.0/24 dev lo table 99".split())
    one = Host()
    assert [rule["priority"] for rule in one.rules_of_routing(4)][:2] == [0, 9]
    assert [route["dst"] for route in one.routes(4, "99")] == ["192.0.2.0/24"]
    assert one.routes(4, "98") == []


@pytest.mark.usefixtures("network")
def test_rules_of_others() -> None:
    programs.run(["nft", "-f", "-"], "table inet somebodys { chain c { }; }")
    programs.run("iptables-nft -A INPUT -j ACCEPT".split())
    one = Host()
    assert "somebodys" in {table["table"]["name"] for table in one.nft_ruleset if "table" in table}
    assert "-A INPUT -j ACCEPT" in dict(one.iptables_rules)["iptables-nft"]


@pytest.mark.usefixtures("network")
def test_rights_in_a_network_of_ones_own() -> None:
    assert Host().may(host.NET_ADMIN) and Host().may(host.NET_RAW)


def test_what_is_no_answer_is_nothing() -> None:
    assert host.ask("ip", "-json", "link", "show", "no-such-link") == []
