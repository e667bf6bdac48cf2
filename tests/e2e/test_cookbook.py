"""The recipes of docs/cookbook.rst, and what docs/interception.rst says of a dead relay, as they stand there."""

import contextlib
import os
import re
import signal
import socket
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from recipes import DOCS, PATIENCE, attempt, block, options, run, talk

from tproxy_relay.intercept import programs
from tproxy_relay.lab import Host, Lab

pytestmark = pytest.mark.slow

PAGE = "cookbook.rst"
BOTH_FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
MARK = "0x1000000/0x7000000"

Skip = Callable[[str], NoReturn]


@pytest.fixture
def iptables(require_or_skip: Skip) -> None:
    if programs.find("iptables") is None:
        require_or_skip("this recipe needs iptables: apt-get install iptables")


def lines(name: str, page: str = PAGE) -> list[str]:
    return block(page, name).splitlines()


# --- gateway, sidecar, local programs


@BOTH_FAMILIES
@pytest.mark.parametrize(
    ("name", "source"),
    [("gateway", "relay"), ("gateway-interface", "relay"), ("gateway-source", "address"), ("gateway-closed", "relay")],
)
def test_a_gateway(name: str, source: str, family: int, lab: Lab) -> None:
    (line,) = lines(name)
    with lab.relay_process(*options(line)) as relay:
        client, seen = talk(lab.client, lab.server, 8080, family)
        with client:
            assert relay.record_of(client)["source"] == source
        assert seen == (lab.client.address(family) if source == "address" else lab.relay_address(family))
        relay.stop()


@BOTH_FAMILIES
def test_a_sidecar(family: int, lab: Lab, tmp_path: Path) -> None:
    conf = tmp_path / "tproxy-relay.conf"
    conf.write_text(block(PAGE, "sidecar"))
    with lab.relay_process("--config", str(conf), "--log-format", "json") as relay:
        client, seen = talk(lab.client, lab.relay, 8080, family)
        with client:
            assert relay.record_of(client)["outcome"] == "completed"
        assert seen == lab.client.address(family)
        here, _ = talk(lab.relay, lab.relay, 8080, family)  # directly
        here.close()
        relay.stop()
        assert len(relay.records()) == 1


@BOTH_FAMILIES
@pytest.mark.parametrize("name", ["local", "both"])
def test_local_programs(name: str, family: int, lab: Lab) -> None:
    (line,) = lines(name)
    with lab.relay_process(*options(line)) as relay:
        client, _ = talk(lab.relay, lab.server, 443, family)
        with client:
            assert relay.record_of(client)["outcome"] == "completed"
        if name == "both":
            client, _ = talk(lab.client, lab.server, 8080, family)
            with client:
                assert relay.record_of(client)["outcome"] == "completed"
        relay.stop()


# --- Docker


DOCKER = textwrap.dedent("""\
    iptables -t nat -N DOCKER
    iptables -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
    iptables -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
    iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
    iptables -t nat -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
    iptables -P FORWARD DROP
    iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    iptables -A FORWARD -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
    iptables -A FORWARD -i docker0 ! -o docker0 -j ACCEPT
    """)
"""What Docker 28 installs for `docker run -p 8080:80`, as far as it meets these connections."""

BRIDGE = textwrap.dedent("""\
    link add docker0 type bridge
    addr add 172.17.0.1/16 dev docker0
    link set docker0 up
    link add veth0 type veth peer name eth0 netns {pid}
    link set veth0 master docker0 up
    """)
CONTAINER = textwrap.dedent("""\
    link set lo up
    addr add 172.17.0.2/16 dev eth0
    link set eth0 up
    route add default via 172.17.0.1
    """)


@contextlib.contextmanager
def container(lab: Lab) -> Iterator[Host]:
    """A host on a bridge of the relay's host, with Docker's rules around it."""
    lead = [*(lab.relay.entrance() if lab.user_namespace else []), "unshare", "-n", "--"]
    host = Host("container", "172.17.0.2", "::", lead, user=lab.user_namespace)
    try:
        host.await_ready()
        lab.relay.run(["ip", "-batch", "-"], input=BRIDGE.format(pid=host.pid))
        host.run(["ip", "-batch", "-"], input=CONTAINER)
        lab.relay.run(["sh", "-e"], input=DOCKER)
        yield host
    finally:
        host.close()


def bridges_call_iptables(lab: Lab, value: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # without br_netfilter they cannot
        lab.relay.set_sysctl("net.bridge.bridge-nf-call-iptables", value)


@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize("br_netfilter", [0, 1])
@pytest.mark.parametrize("backend", ["nft", "iptables"])
def test_published_ports(backend: str, br_netfilter: int, fresh_lab: Lab) -> None:
    lab = fresh_lab
    (line,) = lines("docker-published")
    with container(lab) as inside, lab.relay_process(*options(line), "--backend", backend) as relay:
        bridges_call_iptables(lab, br_netfilter)
        client, seen = talk(lab.client, inside, 8080, listen_port=80, address=lab.relay.ipv4)
        with client:
            assert relay.record_of(client)["orig_dst"] == f"{lab.relay.ipv4}:8080"
        assert seen == lab.relay.ipv4


@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize("backend", ["nft", "iptables"])
def test_published_ports_with_tproxy(backend: str, fresh_lab: Lab) -> None:
    """With the line of docs/interception.rst that keeps nat away."""
    lab = fresh_lab
    with container(lab) as inside, lab.relay_process("--intercept-inbound", "8080", "--backend", backend) as relay:
        bridges_call_iptables(lab, 0)
        run(lab, block("interception.rst", "no-nat"))
        client, seen = talk(lab.client, inside, 8080, listen_port=80, address=lab.relay.ipv4)
        with client:
            assert relay.record_of(client)["orig_dst"] == f"{lab.relay.ipv4}:8080"
        assert seen == lab.relay.ipv4


@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize("name", ["docker-outgoing", "docker-outgoing-tproxy"])
def test_what_containers_connect_to(name: str, fresh_lab: Lab) -> None:
    lab = fresh_lab
    *before, line = lines(name)
    with container(lab) as inside:
        bridges_call_iptables(lab, 1)
        for setting in re.findall(r"(\S+)=(\d)", "".join(before)):
            with contextlib.suppress(FileNotFoundError):
                lab.relay.set_sysctl(*setting)
        with lab.relay_process(*options(line)) as relay:
            client, seen = talk(inside, lab.server, 443)
            with client:
                assert relay.record_of(client)["orig_dst"] == f"{lab.server.ipv4}:443"
            assert seen == lab.relay_address()


# --- firewalls


FIREWALLD = textwrap.dedent("""\
    table inet firewalld {
        chain filter_PREROUTING {
            type filter hook prerouting priority mangle + 10;
            meta nfproto ipv6 fib saddr . mark . iif oif missing drop
        }
        chain filter_INPUT {
            type filter hook input priority filter + 10;
            ct state { established, related } accept
            ct status dnat accept
            iifname "lo" accept
            ct state invalid drop
            icmpv6 type != 0 accept
            PORTS
            reject with icmpx admin-prohibited
        }
    }
    """)
"""What firewalld 1.3 installs, as far as it meets these connections; PORTS is what its zone lets in."""


def opened() -> str:
    ports = re.findall(r"--add-port=(\d+)/tcp", block(PAGE, "firewalld"))
    return "tcp dport { " + ", ".join(ports) + " } accept"


@BOTH_FAMILIES
@pytest.mark.parametrize("extra", [[], ["--preserve-source", "address"]], ids=["no", "address"])
@pytest.mark.parametrize("name", ["server", "relay"])
def test_firewalld(name: str, extra: list[str], family: int, fresh_lab: Lab) -> None:
    lab, server = fresh_lab, getattr(fresh_lab, name)
    lab.relay.run(["nft", "-f", "-"], input=FIREWALLD.replace("PORTS", opened()))
    with lab.relay_process("--intercept-inbound", "8080", *extra) as relay:
        client, _ = talk(lab.client, server, 8080, family)
        with client:
            assert relay.record_of(client)["outcome"] == "completed"


def test_firewalld_and_the_listeners_port_do_not_do(fresh_lab: Lab) -> None:
    ports = opened().replace("8080", "15006")
    fresh_lab.relay.run(["nft", "-f", "-"], input=FIREWALLD.replace("PORTS", ports))
    with fresh_lab.relay_process("--intercept-inbound", "8080"), fresh_lab.server.listen(8080):
        with pytest.raises(OSError):
            fresh_lab.client.connect(fresh_lab.server.ipv4, 8080, timeout=1.5)


def test_firewalld_and_redirect(fresh_lab: Lab) -> None:
    fresh_lab.relay.run(["nft", "-f", "-"], input=FIREWALLD.replace("PORTS", ""))
    with fresh_lab.relay_process("--intercept-inbound", "8080", "--mode", "redirect"):
        talk(fresh_lab.client, fresh_lab.server, 8080)[0].close()


@BOTH_FAMILIES
def test_firewalld_and_local_programs(family: int, fresh_lab: Lab) -> None:
    rules = FIREWALLD.replace("PORTS", "")
    if "IPv6_rpfilter=no" in (DOCS / PAGE).read_text():
        rules = re.sub(r".* fib .*\n", "", rules)
    fresh_lab.relay.run(["nft", "-f", "-"], input=rules)
    with fresh_lab.relay_process(*options(lines("local")[0])) as relay:
        client, _ = talk(fresh_lab.relay, fresh_lab.server, 443, family)
        with client:
            assert relay.record_of(client)["outcome"] == "completed"


UFW = textwrap.dedent("""\
    *filter
    :INPUT DROP [0:0]
    :FORWARD DROP [0:0]
    :ufw-before-input - [0:0]
    :ufw-not-local - [0:0]
    :ufw-user-input - [0:0]
    -A INPUT -j ufw-before-input
    -A INPUT -j ufw-user-input
    -A ufw-before-input -i lo -j ACCEPT
    -A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    BEFORE
    -A ufw-before-input -m conntrack --ctstate INVALID -j DROP
    -A ufw-before-input -j ufw-not-local
    -A ufw-not-local -m addrtype --dst-type LOCAL -j RETURN
    -A ufw-not-local -j DROP
    USER
    COMMIT
    """)
"""What ufw 0.36 installs, as far as it meets these connections; BEFORE is the place that the page names."""


@pytest.mark.slow
@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize("backend", ["nft", "iptables"])
@pytest.mark.parametrize(
    ("before", "allowed", "server", "answer"),
    [
        ("", "8080", "server", "no answer"),  # ufw allow 8080/tcp is not enough for a gateway
        ("recipe", "", "server", "connected"),
        ("", "", "relay", "no answer"),
        ("", "8080", "relay", "connected"),
    ],
)
def test_ufw(before: str, allowed: str, server: str, answer: str, backend: str, fresh_lab: Lab) -> None:
    user = f"-A ufw-user-input -p tcp --dport {allowed} -j ACCEPT" if allowed else ""
    rules = UFW.replace("BEFORE\n", block(PAGE, "ufw") if before else "").replace("USER", user)
    fresh_lab.relay.run(["iptables-restore", "--noflush"], input=rules)
    with fresh_lab.relay_process("--intercept-inbound", "8080", "--backend", backend):
        host = getattr(fresh_lab, server)
        if answer == "connected":
            talk(fresh_lab.client, host, 8080)[0].close()
        else:
            assert attempt(fresh_lab.client, host.ipv4, 8080) == answer


@pytest.mark.usefixtures("iptables")
def test_ufw_and_local_programs(fresh_lab: Lab) -> None:
    rules = UFW.replace("BEFORE\n", "").replace("USER", "")
    fresh_lab.relay.run(["iptables-restore", "--noflush"], input=rules)
    with fresh_lab.relay_process(*options(lines("local")[0])):
        talk(fresh_lab.relay, fresh_lab.server, 443)[0].close()


@pytest.mark.usefixtures("iptables")
def test_ufw_and_redirect(fresh_lab: Lab) -> None:
    port = re.search(r"``ufw allow (\d+)/tcp`` instead", (DOCS / PAGE).read_text())
    assert port
    rules = UFW.replace("BEFORE\n", "").replace("USER", f"-A ufw-user-input -p tcp --dport {port[1]} -j ACCEPT")
    fresh_lab.relay.run(["iptables-restore", "--noflush"], input=rules)
    with fresh_lab.relay_process("--intercept-inbound", "8080", "--mode", "redirect"):
        talk(fresh_lab.client, fresh_lab.server, 8080)[0].close()


@BOTH_FAMILIES
def test_a_firewall_of_your_own(family: int, fresh_lab: Lab) -> None:
    icmp = "ct state established accept; icmpv6 type != 0 accept"
    chain = f"type filter hook input priority 0; policy drop; {icmp}\n{block(PAGE, 'nftables')}"
    fresh_lab.relay.run(["nft", "-f", "-"], input=f"table inet own {{ chain input {{ {chain} }}\n}}")
    with fresh_lab.relay_process("--intercept-inbound", "8080"):
        talk(fresh_lab.client, fresh_lab.server, 8080, family)[0].close()


# --- by hand


def test_by_hand(lab: Lab) -> None:
    with lab.relay_process() as relay:
        done = run(lab, block("interception.rst", "by-hand"))  # every line must succeed, `status` too
        assert "tproxy ip to :15006" in done.stdout
        assert "active" in done.stdout
        relay.stop()
    run(lab, "! nft list table inet tproxy_relay")


def test_before_and_after(lab: Lab) -> None:
    first, second = lines("before-and-after")
    run(lab, first)
    with lab.relay_process(*options(lines("gateway")[0])) as relay:
        assert "active" in run(lab, second).stdout
        relay.stop()
    left = run(lab, block(PAGE, "undo")).stdout
    assert "tproxy_relay" not in left and "fwmark" not in left


def test_a_trial_ends_by_itself(lab: Lab) -> None:
    show, trial = lines("trial")
    run(lab, show)
    with lab.relay_process(*options(trial)) as relay:
        relay.signal(signal.SIGTERM)  # what timeout(1) sends
        assert relay.wait() == 0
    assert run(lab, block(PAGE, "undo")).stdout.count("fwmark") == 0


# --- a relay that is gone


def cells() -> Iterator[tuple[str, str, str, str]]:
    """The page's table: rules, direction, backend, and how a new connection is answered."""
    for line in (DOCS / "interception.rst").read_text().splitlines():
        row = re.fullmatch(r"(``(?:run|apply)``, .*?)  +(.*?)  +(.*)", line)
        for backend in ("nft", "iptables"):
            other = {"nft": "iptables", "iptables": "nft"}[backend]
            if row and other not in row[1]:
                rules = row[1].replace("``", "")
                yield rules, "inbound", backend, row[2].strip()
                yield rules, "outbound", backend, row[3].strip()


def settings(rules: str, backend: str) -> list[str]:
    closed = ["--on-failure", "closed"] if "closed" in rules else []
    mode = ["--mode", "redirect"] if "redirect" in rules else []
    return [*closed, *mode, "--backend", backend]


def await_answer(expected: str, client: Host, server: Host) -> None:
    """The guard needs a moment."""
    deadline, answer = time.monotonic() + PATIENCE, ""
    while answer != expected and time.monotonic() < deadline:
        answer = attempt(client, server.ipv4, 8080)
    assert answer == expected


@pytest.mark.slow
@pytest.mark.usefixtures("iptables")
@pytest.mark.parametrize(("rules", "direction", "backend", "answer"), list(cells()))
def test_what_new_connections_meet(rules: str, direction: str, backend: str, answer: str, fresh_lab: Lab) -> None:
    arguments = [f"--intercept-{direction}", "8080", *settings(rules, backend)]
    if rules.startswith("run"):
        with fresh_lab.relay_process(*arguments) as relay:
            relay.kill()
    else:
        run(fresh_lab, f"tproxy-relay rules apply {' '.join(arguments)}\n")
    client = fresh_lab.client if direction == "inbound" else fresh_lab.relay
    with fresh_lab.server.listen(8080):
        await_answer("connected" if answer == "direct" else answer, client, fresh_lab.server)


@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_what_remains_when_all_is_killed(on_failure: str, fresh_lab: Lab) -> None:
    lab = fresh_lab
    with lab.relay_process("--intercept-inbound", "8080", "--backend", "nft", "--on-failure", on_failure) as relay:
        everybody = inhabitants(lab.relay)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody is to do anything about the death of another
            for pid in everybody:
                with contextlib.suppress(ProcessLookupError):  # a worker dies with the supervisor
                    os.kill(pid, number)
        relay.kill()
        with lab.server.listen(8080):
            await_answer("connected" if on_failure == "open" else "refused", lab.client, lab.server)
        assert "fwmark" in lab.relay.run(["ip", "rule"]).stdout
        run(lab, "tproxy-relay rules remove")
        assert "fwmark" not in lab.relay.run(["ip", "rule"]).stdout


def inhabitants(host: Host) -> list[int]:
    """The processes in the host's network namespace, but for the one that holds it."""
    here = os.stat(f"/proc/{host.pid}/ns/net")
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(name) != host.pid and os.path.samestat(os.stat(f"/proc/{name}/ns/net"), here):
                found.append(int(name))
    return found
