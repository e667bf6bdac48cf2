"""Settings of the kernel that break interception, in a network whose settings are changed."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from doctor import PORT, case, levels

from tproxy_relay.check import sysctls
from tproxy_relay.check.context import Case
from tproxy_relay.intercept import programs

pytestmark = pytest.mark.usefixtures("network")


def set_sysctl(name: str, value: int) -> None:
    Path("/proc/sys/net", *name.split(".")).write_text(str(value))


def mend(remedy: str) -> None:
    """Do what the doctor says, as it says it."""
    subprocess.run(["sh", "-c", remedy], check=True, stdout=subprocess.DEVNULL)


def links(*kinds: str) -> None:
    """Interfaces eth0, eth1 ... with an address each, which are up."""
    for number, kind in enumerate(kinds):
        programs.run(["ip", "link", "add", f"eth{number}", "type", kind])
        programs.run(["ip", "addr", "add", f"192.0.2.{number * 4 + 1}/30", "dev", f"eth{number}"])
        programs.run(["ip", "link", "set", f"eth{number}", "up"])


def test_strict_values_are_no_problem() -> None:
    set_sysctl("ipv4.conf.all.rp_filter", 1)
    (found,) = sysctls.probe_harmless(case())
    assert found.level == "ok" and "rp_filter on" in found.what.replace(",", " on")
    for name in ("all", "default", "lo"):
        set_sysctl(f"ipv4.conf.{name}.rp_filter", 0)
    (found,) = sysctls.probe_harmless(case())
    assert "rp_filter" not in found.what or found.what.endswith("are off")


def test_nonlocal_bind() -> None:
    assert not [*sysctls.probe_nonlocal_bind(case())]
    set_sysctl("ipv4.ip_nonlocal_bind", 1)
    (found,) = sysctls.probe_nonlocal_bind(case())
    assert found.level == "problem"
    mend(found.remedy)
    assert not [*sysctls.probe_nonlocal_bind(case())]


def test_paths_are_probed() -> None:
    set_sysctl("ipv4.tcp_mtu_probing", 0)
    (found,) = sysctls.probe_path_mtu(case())
    assert (found.name, found.level) == ("path-mtu", "warning")
    mend(found.remedy)
    assert levels([*sysctls.probe_path_mtu(case())]) == [("path-mtu", "ok")]
    set_sysctl("ipv4.tcp_mtu_probing", 2)
    assert levels([*sysctls.probe_path_mtu(case())]) == [("path-mtu", "ok")]


@pytest.mark.parametrize("mode", ["tproxy", "redirect"])
def test_conntrack_must_not_forget_idle_connections_before_they_are_probed(mode: str) -> None:
    outbound = {"intercept_inbound": (), "intercept_outbound": (PORT,), "mode": mode, "keepalive": 60}
    set_sysctl("netfilter.nf_conntrack_tcp_timeout_established", 61)
    assert levels([*sysctls.probe_idle_connections(case(**outbound))]) == [("conntrack-timeout", "ok")]
    set_sysctl("netfilter.nf_conntrack_tcp_timeout_established", 60)
    (found,) = sysctls.probe_idle_connections(case(**outbound))
    assert (found.name, found.level) == ("conntrack-timeout", "warning")
    assert not [*sysctls.probe_idle_connections(case())], "what only comes in does not need conntrack"
    mend(found.remedy)
    assert levels([*sysctls.probe_idle_connections(case(**outbound))]) == [("conntrack-timeout", "ok")]


def test_lo_must_be_up_and_have_ipv6() -> None:
    links("veth")
    programs.run("ip addr add 2001:db8::1/64 dev eth0 nodad".split())
    assert levels([*sysctls.probe_loopback(case())]) == [("lo", "ok")]
    one = case()
    for change in ("ip link set lo down", "sysctl -q -w net.ipv6.conf.lo.disable_ipv6=1"):
        programs.run(change.split())
        (found,) = sysctls.probe_loopback(one)
        assert (found.name, found.level) == ("lo", "problem")
        mend(found.remedy)
        one = case()
    assert levels([*sysctls.probe_loopback(one)]) == [("lo", "ok")]


def test_where_ipv6_is_switched_off_lo_needs_none() -> None:
    links("veth")
    for scope in ("all", "default"):
        set_sysctl(f"ipv6.conf.{scope}.disable_ipv6", 1)
    assert levels([*sysctls.probe_loopback(case())]) == [("lo", "ok")]


def test_the_interface_that_is_listened_on() -> None:
    programs.run("ip link add eth0 type veth peer name eth1".split())
    (found,) = sysctls.probe_interface(case(interface="eth0"))
    assert found.level == "problem"
    mend(found.remedy)
    assert not [*sysctls.probe_interface(case(interface="eth0"))] and not [*sysctls.probe_interface(case())]


def test_a_gateway_forwards() -> None:
    links("veth", "veth")
    set_sysctl("ipv4.ip_forward", 0)
    (found, *_) = sysctls.probe_forwarding(case())
    assert (found.name, found.level) == ("forwarding-ipv4", "problem")
    mend(found.remedy)
    (found, *_) = sysctls.probe_forwarding(case())
    assert (found.name, found.level) == ("forwarding-ipv4", "ok")
    set_sysctl("ipv4.conf.eth1.forwarding", 0)
    (found, *_) = sysctls.probe_forwarding(case())
    assert found.what == "net.ipv4.conf.eth1.forwarding is 0"
    mend(found.remedy)
    assert next(iter(sysctls.probe_forwarding(case()))).level == "ok"
    assert not [*sysctls.probe_forwarding(case(on_failure="closed"))]


def test_bridges_whose_packets_meet_the_rules() -> None:
    assert not [*sysctls.probe_bridges(case())], "there is none"
    links("bridge")
    programs.run("ip route add default dev eth0".split())
    programs.run("ip -6 route add default dev eth0".split())
    for found in sysctls.probe_bridges(case()):
        if found.level == "problem":  # br_netfilter is loaded, and takes packets of bridges unless told otherwise
            assert found.what.startswith("net.bridge.bridge-nf-call-")
            mend(found.remedy)
    assert levels([*sysctls.probe_bridges(case())]) == [("bridge", "ok")]
    programs.run("ip link set eth0 type bridge nf_call_iptables 1".split())
    (found,) = sysctls.probe_bridges(case())
    assert (found.name, found.level) == ("bridge-ipv4", "problem")
    mend(found.remedy)
    assert levels([*sysctls.probe_bridges(case())]) == [("bridge", "ok")]


def test_bridges_of_containers_are_no_problem_of_clients_that_come_elsewhere() -> None:
    links("bridge", "veth")
    for name in ("net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables"):
        if sysctls.number(name) is not None:
            programs.run(["sysctl", "-q", "-w", f"{name}=0"])
    programs.run("ip link set eth0 type bridge nf_call_iptables 1".split())
    (found,) = sysctls.probe_bridges(case())
    assert (found.name, found.level, found.remedy) == ("bridge-ipv4", "warning", "")
    programs.run("ip route add default dev eth1".split())
    (found,) = sysctls.probe_bridges(case())
    assert found.level == "warning" and "--interface eth1" in found.remedy, "Kubernetes needs it as it is"
    assert not [*sysctls.probe_bridges(case(interface="eth1"))]
    assert [one.level for one in sysctls.probe_bridges(case(interface="eth0"))] == ["problem"]


@pytest.mark.parametrize("name", ["$(>pwned)", "`>pwned`", ";>pwned;", "a'b", "-x", "{x}", "up"])
def test_the_names_of_interfaces_are_words(tmp_path: Path, name: str) -> None:
    """In containers others choose them."""
    programs.run(["ip", "link", "add", "name", "tame0", "type", "bridge", "nf_call_iptables", "1"])
    programs.run(["ip", "link", "set", "dev", "tame0", "name", name])
    one = case()
    one = Case(replace(one.settings, interface=name), one.plan)
    down = [*sysctls.probe_interface(one)]
    assert len(down) == 1
    subprocess.run(["sh", "-c", down[0].remedy], check=True, cwd=tmp_path)
    for family in "46":
        programs.run(["ip", f"-{family}", "route", "add", "default", "dev", name])
    found = [*sysctls.probe_bridges(case())]
    assert found and {one.level for one in found} == {"problem"}
    for each in found:
        subprocess.run(["sh", "-c", each.remedy], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)
    assert levels([*sysctls.probe_bridges(case())]) == [("bridge", "ok")]
    assert not [*sysctls.probe_interface(Case(one.settings, one.plan))] and not [*tmp_path.iterdir()]
