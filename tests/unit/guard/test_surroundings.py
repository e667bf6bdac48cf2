"""What the guard notices beside its own rules."""

import socket
from pathlib import Path

import networks
import pytest
from plans import PLAN

from tproxy_relay.guard import surroundings
from tproxy_relay.guard.messages import Counted, Event, HostChanged
from tproxy_relay.guard.netlink import Changes
from tproxy_relay.guard.surroundings import Surroundings
from tproxy_relay.intercept import backends, programs
from tproxy_relay.intercept.backend_nft import Nft

pytestmark = pytest.mark.usefixtures("network")


def told(one: Surroundings, said: list[Event]) -> list[Event]:
    one.read()
    one.tell()
    one.look(Nft())
    taken = list(said)
    said.clear()
    return taken


@pytest.mark.parametrize(
    "command, changes",
    [
        ("ip rule add pref 9 lookup 9", True),
        ("nft add table inet somebodys", True),
        ("ip link add one type veth", True),
        ("ip link add tprchk0 type veth peer name tprchk1", False),
        ("ip route add local 192.0.2.0/24 dev lo table 9", False),
    ],
)
def test_who_changes_the_host_is_told_of_once(command: str, changes: bool) -> None:
    said: list[Event] = []
    one = Surroundings(Changes(nftables=True), said.append)
    assert told(one, said) == []
    programs.run(command.split())
    assert told(one, said) == [HostChanged()] * changes
    assert told(one, said) == []


@pytest.mark.skipif(not networks.LEGACY_IPTABLES, reason="legacy iptables need the real root")
def test_the_legacy_iptables_report_nothing_and_are_compared() -> None:
    said: list[Event] = []
    programs.run("iptables-legacy -t nat -A PREROUTING -p tcp --dport 80 -j ACCEPT".split())
    one = Surroundings(Changes(nftables=True), said.append)
    assert told(one, said) == []
    programs.run("iptables-legacy -t nat -A PREROUTING -p tcp --dport 81 -j ACCEPT".split())
    assert told(one, said) == [HostChanged()]
    programs.run("iptables-legacy -t nat -N TPROXY_RELAY_x".split())
    assert told(one, said) == [], "our own are the guard's matter"


def test_sysctls_report_nothing_and_are_compared() -> None:
    said: list[Event] = []
    one = Surroundings(Changes(nftables=True), said.append)
    assert told(one, said) == []
    switch = Path("/proc/sys/net/ipv4/ip_forward")
    switch.write_text("0" if switch.read_text() == "1\n" else "1")
    assert told(one, said) == [HostChanged()]


@pytest.mark.parametrize("backend", ["nft", "iptables-nft"])
def test_connections_that_the_rules_take_are_counted(backend: str) -> None:
    said: list[Event] = []
    where = backends.of_name(backend)
    where.install(PLAN, "active")
    one = Surroundings(Changes(nftables=True), said.append)
    assert surroundings.count(where) == Counted(0, 0)
    programs.run("ip link add one type veth peer name other".split())
    for link in ("one", "other"):
        programs.run(["ip", "link", "set", link, "up"])
    programs.run("ip addr add 192.0.2.1/24 dev one".split())
    with socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(("192.0.2.2", 443))
        one.look(where)
    assert [event for event in said if isinstance(event, Counted)] == [Counted(0, 1)]
