"""A router with one arm is told apart from others, and its remedy works."""

import socket
import subprocess

import pytest
from doctor import case, levels

from tproxy_relay.check import redirects
from tproxy_relay.check.finding import OK, WARNING
from tproxy_relay.intercept import programs

pytestmark = pytest.mark.usefixtures("network")


def arm(name: str, address: str) -> None:
    """One more interface of the host, with this address."""
    for words in (f"link add {name} type veth peer name {name}-peer", f"link set {name} up"):
        programs.run(["ip", *words.split()])
    programs.run(["ip", "link", "set", f"{name}-peer", "up"])
    programs.run(["ip", "address", "add", address, "dev", name])


def sysctl(name: str, value: int) -> None:
    programs.run(["sysctl", "-qw", f"{name}={value}"])


def router() -> None:
    """The network of this test forwards, and says what kernels say by default. No fixture: those run outside of it."""
    sysctl("net.ipv4.ip_forward", 1)
    for name in ("all", "default"):
        sysctl(f"net.ipv4.conf.{name}.send_redirects", 1)
    arm("one", "192.0.2.1/24")


def test_one_arm_tells_clients_of_a_shorter_way_until_it_is_mended() -> None:
    router()
    (found,) = redirects.probe_redirects(case())
    assert (found.name, found.level) == ("redirects", WARNING)
    assert "net.ipv4.conf.all.send_redirects is 1" in found.what and "one" in found.what
    subprocess.run(found.remedy, shell=True, check=True, stdout=subprocess.DEVNULL)
    assert levels(list(redirects.probe_redirects(case()))) == [("redirects", OK)]


@pytest.mark.parametrize("name", ["all", "one"])
def test_either_setting_is_enough(name: str) -> None:
    router()
    for each in ("all", "one"):
        sysctl(f"net.ipv4.conf.{each}.send_redirects", int(each == name))
    (found,) = redirects.probe_redirects(case())
    assert found.remedy == f"sysctl -w net.ipv4.conf.{name}.send_redirects=0"


def test_two_arms_are_an_ordinary_router() -> None:
    router()
    arm("two", "198.51.100.1/24")
    assert list(redirects.probe_redirects(case())) == []
    programs.run(["ip", "route", "add", "default", "via", "198.51.100.2"])
    assert list(redirects.probe_redirects(case(interface="one"))) == []
    assert levels(list(redirects.probe_redirects(case(interface="two")))) == [("redirects", WARNING)]


def test_what_forwards_nothing_says_nothing() -> None:
    router()
    sysctl("net.ipv4.ip_forward", 0)
    assert list(redirects.probe_redirects(case())) == []


def test_outbound_has_no_clients() -> None:
    router()
    assert list(redirects.probe_redirects(case(intercept_inbound=()))) == []


def test_a_server_on_this_host_is_nobody_s_router() -> None:
    router()
    with socket.create_server(("0.0.0.0", 8000)):
        assert list(redirects.probe_redirects(case())) == []
