"""What the system lets the relay have, on this host and in a network whose settings are changed."""

import shlex
import socket
from pathlib import Path

import pytest
from doctor import case, levels

from tproxy_relay.check import limits
from tproxy_relay.intercept import programs

in_network = pytest.mark.usefixtures("network")


@pytest.mark.parametrize(
    "port, ranges, expected",
    [(80, "", False), (80, "80", True), (80, "22,79-81", True), (80, "22,81-90", False), (8080, "80,8080", True)],
)
def test_lists_of_ports(port: int, ranges: str, expected: bool) -> None:
    assert limits.in_list(port, ranges) is expected


def test_more_threads_take_more_maps() -> None:
    assert limits.maps_for(1000) - limits.maps_for(0) == 4000


def mend(remedy: str) -> None:
    """Do what the doctor says, as it says it."""
    programs.run(shlex.split(remedy))


@in_network
def test_ports_that_somebody_has_and_others_in_their_place() -> None:
    one = case(intercept_inbound=(), ports=(15002, 15006), bind=("127.0.0.1",))
    assert levels([*limits.probe_ports(one)]) == [("ports", "ok")]
    with socket.create_server(("127.0.0.1", 15006)):
        (found,) = limits.probe_ports(one)
        assert found.level == "problem" and "127.0.0.1:15006 is taken by process" in found.what
        assert "--ports 15002,15007" in found.remedy and "--inbound-port 15007" in found.remedy


@in_network
def test_addresses_and_interfaces_that_are_not_there() -> None:
    (found, _) = limits.probe_ports(case(bind=("192.0.2.1",)))
    assert found.what == "192.0.2.1 is no address of this host" and "--bind" not in found.remedy.split()[2:2]
    (found, *_) = limits.probe_ports(case(interface="eth99"))
    assert found.what.startswith("there is no interface eth99") and "--interface" not in found.remedy


@in_network
def test_ports_for_outgoing_connections() -> None:
    Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("15000 15100")
    reserved, few = limits.probe_ephemeral_ports(case())
    assert (reserved.name, reserved.level) == ("reserved-ports", "warning")
    assert (few.name, few.level) == ("port-range", "problem")
    mend(reserved.remedy)
    mend(few.remedy)
    assert levels([*limits.probe_ephemeral_ports(case())]) == [("port-range", "ok")]


@in_network
def test_room_in_the_backlog() -> None:
    Path("/proc/sys/net/core/somaxconn").write_text("16")
    Path("/proc/sys/net/ipv4/tcp_abort_on_overflow").write_text("1")
    found = [*limits.probe_backlog(case())]
    assert levels(found) == [("somaxconn", "warning"), ("abort-on-overflow", "warning")]
    for one in found:
        mend(one.remedy)
    assert levels([*limits.probe_backlog(case())]) == [("somaxconn", "ok")]


@pytest.mark.parametrize(
    "probe, name, level",
    [
        (limits.probe_descriptors, "descriptors", "problem"),
        (limits.probe_threads, "threads", "problem"),
        (limits.probe_memory, "memory", "warning"),
    ],
)
def test_more_connections_than_there_is_room_for(probe: object, name: str, level: str) -> None:
    assert callable(probe)
    assert levels([*probe(case(max_connections=1))]) == [(name, "ok")]
    (found,) = probe(case(max_connections=1_000_000_000))
    assert (found.name, found.level) == (name, level) and found.remedy
