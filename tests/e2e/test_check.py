"""`tproxy-relay check` on hosts made bad one way at a time: it finds it, and what it prints mends it."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, for_all_accounts
from doctors import Doctor
from interception import EchoServer
from neighbour_trials import RELAYED
from neighbour_trials import seen as seen_by_client
from rows import Seen

import tproxy_relay
from tproxy_relay.lab import Lab, LabError, RelayProcess

pytestmark = pytest.mark.slow

INTERCEPT = ("--intercept-inbound", "8000", "--intercept-outbound", "9000")
APPLY = "tproxy-relay rules apply --config /dev/null --intercept-inbound 8000 --intercept-outbound 9000"
INPUT_CHAIN = (
    "nft add table inet f",
    "nft add chain inet f input '{ type filter hook input priority 0; policy drop; }'",
    "nft add rule inet f input iif lo accept",
    "nft 'add rule inet f input ct state vmap { established : accept, related : accept, invalid : drop }'",
    "nft 'add rule inet f input meta l4proto { icmp, ipv6-icmp } accept'",
    "nft add rule inet f input tcp dport 22 accept",
)


@dataclass(frozen=True)
class Bad:
    """A way in which a host is bad."""

    name: str
    how: tuple[str, ...]
    """Commands that make it so."""
    finding: str
    options: tuple[str, ...] = INTERCEPT
    level: str = "problem"


OFF = "sysctl -w net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0"
BRIDGE = "ip link add br0 up type bridge && ip route add default dev br0 && ip -6 route add default dev br0"
"""By which clients come."""
WAYS = (
    Bad("lo down", ("ip link set lo down",), "lo"),
    Bad("no IPv6 on lo", ("sysctl -w net.ipv6.conf.lo.disable_ipv6=1",), "lo"),
    Bad("IPv4 not forwarded", ("sysctl -w net.ipv4.ip_forward=0",), "forwarding-ipv4"),
    Bad("IPv4 not forwarded from one interface", ("sysctl -w net.ipv4.conf.rc.forwarding=0",), "forwarding-ipv4"),
    Bad("IPv6 not forwarded", ("sysctl -w net.ipv6.conf.all.forwarding=0",), "forwarding-ipv6"),
    Bad("nonlocal bind, IPv4", ("sysctl -w net.ipv4.ip_nonlocal_bind=1",), "nonlocal-bind"),
    Bad("nonlocal bind, IPv6", ("sysctl -w net.ipv6.ip_nonlocal_bind=1",), "nonlocal-bind"),
    Bad("br_netfilter", (BRIDGE, OFF, "sysctl -w net.bridge.bridge-nf-call-iptables=1"), "bridge-ipv4"),
    Bad("br_netfilter, IPv6", (BRIDGE, OFF, "sysctl -w net.bridge.bridge-nf-call-ip6tables=1"), "bridge-ipv6"),
    Bad("br_netfilter, one bridge", (BRIDGE, OFF, "ip link set br0 type bridge nf_call_iptables 1"), "bridge-ipv4"),
    Bad("foreign route", ("ip route add 10.9.0.0/16 dev rs table 7006",), "route-table-ipv4"),
    Bad("foreign IPv6 route", ("ip -6 route add fd09::/64 dev rs table 7006",), "route-table-ipv6"),
    Bad("rule before ours, and no room", ("ip rule add pref 3 lookup main",), "rule-priority-ipv4"),
    Bad("dead end before ours, and no room", ("ip -6 rule add pref 2 unreachable",), "rule-priority-ipv6"),
    Bad(
        "all but default routes before ours, and no room",
        ("ip rule add pref 1 lookup main suppress_prefixlength 0",),
        "rule-priority-ipv4",
    ),
    Bad("marks, ip rule", ("ip rule add pref 9000 fwmark 0x1000000/0xff000000 lookup 52",), "marks"),
    Bad(
        "marks, nft",
        ("nft add table ip x", "nft add chain ip x y", "nft add rule ip x y meta mark set meta mark or 0x06000000"),
        "marks",
    ),
    Bad("marks, iptables-nft", ("iptables-nft -t mangle -A OUTPUT -j MARK --set-xmark 0x2000000/0x2000000",), "marks"),
    Bad("marks, legacy", ("ip6tables-legacy -t mangle -A FORWARD -m mark --mark 0x4000000/0x4000000",), "marks"),
    Bad(
        "another proxy, nft",
        (
            "nft add table inet p",
            "nft add chain inet p pre '{ type filter hook prerouting priority -200; }'",
            "nft add rule inet p pre tcp dport 7000-8999 tproxy to :3128 accept",
        ),
        "other-proxy",
    ),
    Bad(
        "another proxy, iptables",
        ("iptables-legacy -t mangle -A PREROUTING -p tcp -m multiport --dports 80,8000 -j TPROXY --on-port 3128",),
        "other-proxy",
    ),
    Bad("input filter, nft", INPUT_CHAIN, "filter"),
    Bad(
        "input filter in a chain behind, nft",
        (
            *INPUT_CHAIN[:3],
            "nft add chain inet f services",
            "nft add rule inet f services tcp dport { 22, 443 } accept",
            "nft add rule inet f services reject with icmpx type admin-prohibited",
            "nft add rule inet f input jump services",
        ),
        "filter",
    ),
    Bad(
        "input filter, iptables-nft",
        ("iptables-nft -A INPUT -p tcp --dport 22 -j ACCEPT", "iptables-nft -A INPUT ! -i lo -p tcp -j REJECT"),
        "filter",
        INTERCEPT,
    ),
    Bad(
        "input filter, ip6tables-legacy",
        ("ip6tables-legacy -A INPUT -i lo -j ACCEPT", "ip6tables-legacy -P INPUT DROP"),
        "filter",
    ),
    Bad(
        "output filter",
        (
            "nft add table inet f",
            "nft add chain inet f out '{ type filter hook output priority 0; }'",
            "nft add rule inet f out tcp dport 9000 ct state new counter reject",
        ),
        "filter",
    ),
    Bad("rules of a dead relay", (APPLY,), "leftovers"),
    Bad("rules of a dead relay, iptables", (f"{APPLY} --backend iptables",), "leftovers"),
    Bad("routing of a dead relay", ("ip rule add pref 7008 nop protocol 206",), "leftovers"),
    Bad("rules of a dead relay, and no settings", (APPLY,), "leftovers", ()),
    Bad("few ports", ("sysctl -w 'net.ipv4.ip_local_port_range=40000 40100'",), "port-range"),
    Bad(
        "masquerade, nft",
        (
            "nft add table ip n",
            "nft add chain ip n post '{ type nat hook postrouting priority 100; }'",
            "nft add rule ip n post masquerade",
        ),
        "masquerade",
        (*INTERCEPT, "--preserve-source", "address"),
    ),
    Bad(
        "masquerade, iptables",
        ("iptables-legacy -t nat -A POSTROUTING -j MASQUERADE",),
        "masquerade",
        (*INTERCEPT, "--preserve-source", "full"),
    ),
    Bad(
        "interface down",
        ("ip link set rc down",),
        "interface",
        ("--intercept-inbound", "8000", "--interface", "rc", "--on-failure", "closed"),
    ),
    Bad(
        "listener among outgoing ports",
        ("sysctl -w 'net.ipv4.ip_local_port_range=10000 60000'",),
        "reserved-ports",
        level="warning",
    ),
    Bad("paths are not probed", ("sysctl -w net.ipv4.tcp_mtu_probing=0",), "path-mtu", level="warning"),
    Bad("small backlog", ("sysctl -w net.core.somaxconn=128",), "somaxconn", level="warning"),
    Bad("abort on overflow", ("sysctl -w net.ipv4.tcp_abort_on_overflow=1",), "abort-on-overflow", level="warning"),
    Bad(
        "masquerade for some",
        ("iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",),
        "masquerade",
        (*INTERCEPT, "--preserve-source", "address"),
        "warning",
    ),
)

FINE = (
    "sysctl -w net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.src_valid_mark=1 net.ipv4.tcp_fwmark_accept=1",
    "sysctl -w net.ipv4.fwmark_reflect=1",
    # wg-quick, Tailscale without an exit node, Docker, kube-proxy
    "ip rule add pref 32764 lookup main suppress_prefixlength 0",
    "ip route add default via 10.81.2.2 table 52",
    "ip rule add pref 52 lookup 52 suppress_prefixlength 0",
    # Tailscale with one, and somebody at our priority: there is room before them
    "ip rule add pref 5270 lookup 52",
    "ip rule add pref 7006 lookup main",
    "ip rule add pref 32765 not fwmark 0xca6c lookup 51820",
    "ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
    "iptables-nft -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    "iptables-nft -t mangle -A PREROUTING -j MARK --set-xmark 0x4000/0x4000",
    *INPUT_CHAIN,
    "nft add rule inet f input tcp dport 8000-8010 accept",
    "nft add table ip p",
    "nft add chain ip p pre '{ type filter hook prerouting priority -200; }'",
    "nft add rule ip p pre tcp dport { 80, 443 } tproxy to :3128 accept",
)
"""What is there on many hosts, and in nobody's way."""


@pytest.mark.parametrize("bad", WAYS, ids=lambda bad: bad.name)
@pytest.mark.row("B15", "bad sysctls, rules and tools, one by one", "check names each with the command that mends it")
def test_a_bad_way_is_found_and_mended(doctor: Doctor, bad: Bad, seen: Seen) -> None:
    healthy = doctor.check(*bad.options)
    assert not healthy.problems and healthy.code == 0
    assert not healthy.named(bad.finding)
    for line in bad.how:
        doctor.shell(line)
    ill = doctor.check(*bad.options)
    assert ill.code == (1 if bad.level == "problem" else 0)
    assert {one["name"] for one in ill.problems} <= {bad.finding}, "it sees what is not there"
    found = ill.named(bad.finding)
    assert found and all(one["level"] == bad.level and one["what"] and one["why"] for one in found)
    for one in found:
        said = doctor.shell(one["remedy"])  # one that is `tproxy-relay check ...` ends with 1 if it does not help
        if "tproxy-relay check" in one["remedy"]:
            assert "problem:" not in said
            return
    mended = doctor.check(*bad.options)
    assert mended.code == 0 and not mended.named(bad.finding)
    seen("named; mended by it")


def test_a_port_that_somebody_has(fresh_lab: Lab, doctor: Doctor) -> None:
    with fresh_lab.relay.listen(15006, socket.AF_INET6):
        (found,) = doctor.check(*INTERCEPT).problems
        assert found["name"] == "ports" and "[::]:15006" in found["what"]
        assert "--inbound-port" in found["remedy"]
        doctor.shell(found["remedy"])


@pytest.mark.parametrize(
    "finding, options",
    [("interface", ("--interface", "nope0")), ("bind", ("--bind", "10.1.2.3"))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_place_that_is_not_there(doctor: Doctor, finding: str, options: Sequence[str]) -> None:
    found = doctor.check("--intercept-inbound", "8000", *options).named(finding)
    assert found
    doctor.shell(found[0]["remedy"])


def test_too_few_descriptors(doctor: Doctor) -> None:
    options = (*INTERCEPT, "--max-connections", "300", "--workers", "1")
    (found,) = doctor.check(*options, wrapper=["prlimit", "--nofile=500:500"]).problems
    assert found["name"] == "descriptors"
    doctor.shell(found["remedy"])  # no more than what it says is needed


def test_the_shipped_addresses_on_a_host_without_ipv6(doctor: Doctor) -> None:
    """The relay starts there, and says so."""
    doctor.shell("sysctl -w net.ipv6.conf.all.disable_ipv6=1")
    assert doctor.check("--bind", "127.0.0.1,::1", "--intercept-inbound", "8000").named("bind") == []


FOR_NET_RAW = [
    (("--intercept-inbound", "8000"), False),
    (("--intercept-outbound", "8000"), True),
    (("--intercept-inbound", "8000", "--preserve-source", "address"), True),
    *([(("--intercept-outbound", "8000", "--user", ACCOUNT), False)] if HAVE_ACCOUNTS else []),
]


@pytest.mark.parametrize(("options", "needed"), FOR_NET_RAW)
def test_net_raw_is_asked_for_where_the_relay_needs_it(
    doctor: Doctor, fresh_lab: Lab, options: Sequence[str], needed: bool
) -> None:
    """The relay itself is the judge."""
    wrapper = ["setpriv", "--bounding-set", "-net_raw", "--inh-caps", "-net_raw"]
    if "--user" in options:
        wrapper = [*for_all_accounts(), "env", f"PYTHONPATH={Path(tproxy_relay.__file__).parents[1]}", *wrapper]
    assert bool(doctor.check(*options, wrapper=wrapper).named("capabilities")) is needed
    with contextlib.ExitStack() as stack:
        if needed:
            stack.enter_context(pytest.raises(LabError, match="exited with 77 "))
        stack.enter_context(fresh_lab.relay_process(*options, wrapper=wrapper))


@pytest.mark.parametrize("lost", ["net_admin", "net_raw"])
def test_a_capability_that_is_missing(doctor: Doctor, lost: str) -> None:
    wrapper = ["setpriv", "--bounding-set", f"-{lost}", "--inh-caps", f"-{lost}"]
    (found,) = doctor.check(*INTERCEPT, wrapper=wrapper).problems
    assert found["name"] == "capabilities" and found["what"] == f"CAP_{lost.upper()} missing"
    assert doctor.check(*INTERCEPT).code == 0


@pytest.mark.parametrize(
    "programs, backend, finding, package",
    [
        ("nft", "nft", "nft", "nftables"),
        ("nft iptables-restore iptables-legacy-restore", "auto", "nft", "nftables"),
        ("ip", "nft", "ip", "iproute2"),
        ("ip6tables-restore", "iptables", "iptables", "iptables"),
    ],
)
def test_a_program_that_is_missing(doctor: Doctor, programs: str, backend: str, finding: str, package: str) -> None:
    answer = doctor.check(*INTERCEPT, "--backend", backend, wrapper=without(programs.split()))
    found = answer.named(finding)
    assert answer.code == 1 and found and found[0]["level"] == "problem"
    assert "no program" in found[0]["what"] and found[0]["remedy"].endswith(package)


def without(programs: Sequence[str]) -> list[str]:
    """A command prefix: in a mount namespace of its own, these programs are not to be found."""
    hide = "for f in $1; do for d in /usr/local/sbin /usr/sbin /sbin /usr/bin /bin; do "
    hide += '[ -e $d/$f ] && mount --bind /dev/null $d/$f; done; done; shift; exec "$@"'
    return ["unshare", "-m", "--", "sh", "-c", hide, "sh", " ".join(programs)]


def test_what_many_hosts_have_is_fine(doctor: Doctor) -> None:
    for line in FINE:
        doctor.shell(line)
    answer = doctor.check(*INTERCEPT)
    assert answer.code == 0 and not [one for one in answer.findings if one["level"] != "ok"]


def test_a_server_of_its_own_needs_no_forwarding(fresh_lab: Lab, doctor: Doctor) -> None:
    doctor.shell("sysctl -w net.ipv4.ip_forward=0")
    with fresh_lab.relay.listen(8000):
        assert doctor.check("--intercept-inbound", "8000").code == 0


def test_nothing_of_the_trial_is_left(fresh_lab: Lab, doctor: Doctor) -> None:
    looks = ("nft list ruleset", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all")
    looks += ("ip -o address", "iptables-legacy-save | grep -v '^#'", "ss -tlnH")
    before = [doctor.shell(f"{look} || true") for look in looks]
    assert doctor.check(*INTERCEPT).code == 0
    assert [doctor.shell(f"{look} || true") for look in looks] == before


def test_the_text_is_for_people(doctor: Doctor) -> None:
    doctor.shell("sysctl -w net.ipv4.ip_forward=0")
    line = "tproxy-relay check --config /dev/null --intercept-inbound 8000 || echo exit $?"
    *lines, code = doctor.shell(line).splitlines()
    assert code == "exit 1"
    (problem,) = [line for line in lines if not line.startswith("ok: ")]
    assert problem.startswith("problem: net.ipv4.ip_forward is 0: nobody here serves port 8000")
    assert problem.endswith(". Mend: sysctl -w net.ipv4.ip_forward=1")


# --- a connection through the rules


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--backend", "iptables-nft"),
        ("--backend", "iptables-legacy"),
        ("--mode", "redirect"),
        ("--preserve-source", "address"),
        ("--preserve-source", "full"),
        ("--bind", "127.0.0.1,::1"),
        ("--on-failure", "closed"),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_working_interception_is_seen_to_work(fresh_lab: Lab, doctor: Doctor, options: Sequence[str]) -> None:
    with fresh_lab.relay_process(*INTERCEPT, *options) as relay:
        answer = doctor.check(*INTERCEPT, *options)
        assert answer.code == 0, answer.problems
        probes = [one["what"] for one in answer.findings if one["name"] == "self-probe"]
        assert [words for words in probes if words.endswith("is relayed")] == probes and len(probes) == 4
        assert "tprchk" not in doctor.shell("ip -o link")
        for _ in probes:
            relay.wait_for_line(lambda line: line.get("message") == "connection closed")
        assert [record["outcome"] for record in relay.records()] == ["completed"] * len(probes)
        relay.stop()


@pytest.mark.parametrize("mode", ["tproxy", "redirect"])
def test_both_directions_may_begin_with_the_same_port(fresh_lab: Lab, doctor: Doctor, mode: str) -> None:
    options = ("--intercept-inbound", "8000", "--intercept-outbound", "8000", "--mode", mode)
    with fresh_lab.relay_process(*options):
        answer = doctor.check(*options)
        assert not answer.problems
        assert [one["level"] for one in answer.findings if one["name"] == "self-probe"] == ["ok"] * 4


@pytest.fixture
def relay(fresh_lab: Lab, doctor: Doctor) -> Iterator[RelayProcess]:
    """A relay whose rules nobody guards."""
    doctor.shell(APPLY)
    with fresh_lab.relay_process() as running:
        assert doctor.check(*INTERCEPT).code == 0
        yield running


@pytest.mark.parametrize(
    "how, words",
    [
        (("ip rule del pref 7007",), {"inbound IPv4": "lost"}),
        (("nft flush chain inet tproxy_relay prerouting",), {"inbound IPv4": "direct", "inbound IPv6": "direct"}),
        (("nft flush chain inet tproxy_relay output",), {"outbound IPv4": "direct", "outbound IPv6": "direct"}),
        (("ip -6 route flush table 7006",), {"inbound IPv6": "", "outbound IPv6": ""}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_broken_interception_is_seen(
    doctor: Doctor, relay: RelayProcess, how: Sequence[str], words: dict[str, str]
) -> None:
    for line in how:
        doctor.shell(line)
    answer = doctor.check(*INTERCEPT)
    found = {tuple(one["what"].split()[1:3]): one for one in answer.named("self-probe")}
    for connection, word in words.items():
        assert word in found[tuple(connection.split())]["what"]
    assert answer.code == 1 and len([one for one in answer.named("ruleset")]) == 1
    doctor.shell(answer.named("self-probe")[0]["remedy"])
    assert doctor.check(*INTERCEPT).code == 0


def test_a_filter_that_drops_relayed_connections_is_seen_and_mended(doctor: Doctor, relay: RelayProcess) -> None:
    for line in INPUT_CHAIN:
        doctor.shell(line)
    answer = doctor.check(*INTERCEPT)
    assert len(answer.named("self-probe")) == 2, "inbound, by both families"
    (found,) = answer.named("filter")
    doctor.shell(found["remedy"])
    assert doctor.check(*INTERCEPT).code == 0


def test_a_filter_that_lets_in_by_interface_makes_no_problem(
    fresh_lab: Lab, doctor: Doctor, relay: RelayProcess
) -> None:
    """What is tried comes by an interface of its own; clients are relayed."""
    for line in (*INPUT_CHAIN, "nft 'add rule inet f input iifname { rc, rs } accept'"):
        doctor.shell(line)
    with contextlib.closing(EchoServer(fresh_lab.server)):
        assert [seen_by_client(fresh_lab, "gateway", family) for family in ("v4", "v6")] == [RELAYED] * 2
    answer = doctor.check(*INTERCEPT)
    found = [one for one in answer.named("self-probe") if one["level"] == "warning"]
    assert answer.code == 0 and len(found) == 2, "inbound, by both families"
    assert all("nft chain inet f input lets in by interface" in one["why"] for one in found)


def test_a_relay_that_hangs_is_seen(doctor: Doctor, relay: RelayProcess) -> None:
    worker = relay.worker
    os.kill(worker, signal.SIGSTOP)
    try:
        found = doctor.check(*INTERCEPT).named("self-probe")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert len(found) == 4 and all("goes no further" in one["what"] for one in found)


def test_a_relay_without_a_ruleset_is_seen_and_mended(fresh_lab: Lab, doctor: Doctor) -> None:
    with fresh_lab.relay_process():
        (found,) = doctor.check(*INTERCEPT).problems
        assert found["name"] == "ruleset"
        doctor.shell(found["remedy"])
        assert doctor.check(*INTERCEPT).code == 0
