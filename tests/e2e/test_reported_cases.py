"""What users of such programs have reported in public (reported_trials.REPORTS), tried on ours.

Each host is prepared, tried without a relay and with one. Where the two differ, the test says why that is so, and that
the remedy which the manual gives is one.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import reported_trials as trials
from deadlines import wait_until
from interception import BACKENDS, FAMILIES, PORT, EchoServer
from recipes import block
from reported_trials import Prepare, Trial, gateway, to_the_host

from tproxy_relay.lab import Lab, LabError

INBOUND = ("--intercept-inbound", f"{PORT},{trials.OTHER}")
OUTBOUND = ("--intercept-outbound", str(PORT))
ADDRESS = ("--preserve-source", "address")
REDIRECT = ("--mode", "redirect")
FROZEN = 3.0
SUSPICION = 3.0
"""Seconds. A worker that stands still is killed at the second look, a second after the first one."""


def variants(quick: tuple[str, ...], *more: tuple[str, ...]) -> list[object]:
    """Of options: the others are slow."""
    return [quick, *(pytest.param(options, marks=pytest.mark.slow) for options in more)]


BACKEND_OPTIONS = variants(*(("--backend", name) for name in BACKENDS))


@pytest.fixture
def lab(fresh_lab: Lab) -> Iterator[Lab]:
    """One of its own for each, with an echo server on the server's host."""
    server = EchoServer(fresh_lab.server)
    yield fresh_lab
    server.close()


def seen(lab: Lab, trial: Trial) -> list[str]:
    """By both families, one phrase if they are the same."""
    with ThreadPoolExecutor() as threads:
        both = list(threads.map(lambda family: trial(lab, family), FAMILIES.values()))
    return both[:1] if both[0] == both[1] else both


def relayed(lab: Lab, trial: Trial, *options: str, connections: int = len(FAMILIES)) -> list[str]:
    """With a relay, and so many connections went through it."""
    with lab.relay_process(*options) as relay:
        both = seen(lab, trial)
        relay.stop()
        assert len(relay.records()) == connections
    return both


# --- others' rules of routing


def findings(lab: Lab, *options: str) -> list[dict[str, str]]:
    """What `check` says on the relay's host."""
    command = [sys.executable, "-m", "tproxy_relay", "check", "--json", "--config", os.devnull, *options]
    answer: list[dict[str, str]] = json.loads(lab.relay.run(command, check=False).stdout)["findings"]
    return answer


@pytest.mark.parametrize("backend", BACKEND_OPTIONS, ids=str)
@pytest.mark.parametrize(
    "prepare", [trials.with_rules_before_ours, trials.with_rules_for_marks, trials.with_one_rule_for_marks]
)
def test_rules_of_routing_that_come_first(lab: Lab, prepare: Prepare, backend: tuple[str, ...]) -> None:
    """If the relay does not come before them by itself, `check` names them, and the priority that does."""
    prepare(lab)
    assert seen(lab, gateway) == ["served"]
    options = (*INBOUND, *backend)
    named = [one for one in findings(lab, *options) if "comes before" in one["what"]]
    priorities = {one["remedy"].split()[-1] for one in named}
    assert len(priorities) <= 1
    words = [word for priority in priorities for word in ("--route-priority", priority)]
    assert relayed(lab, gateway, *options, *words) == ["served"]


def test_a_client_with_a_way_of_its_own(lab: Lab) -> None:
    """Rules of routing for its address do not know the relay's connection, which has the relay's, and goes where the
    client must not. With preserve-source it has the client's, and goes where that would."""
    trials.with_a_way_of_its_own(lab)
    assert seen(lab, gateway) == ["unreachable"]
    assert relayed(lab, gateway, *INBOUND) == ["served"]
    assert relayed(lab, gateway, *INBOUND, *ADDRESS) == ["reset"]


# --- a router's


def twin(lab: Lab, tool: str, ours: str, theirs: str) -> None:
    """As the manual has it, for these addresses."""
    words = {"iptables": tool, "203.0.113.1": ours, "10.0.0.2": theirs, "8080": str(PORT)}
    command = block("interception.rst", "forward-twin")
    for written, meant in words.items():
        assert written in command
        command = command.replace(written, meant)
    lab.relay.run(["sh", "-c", command])


@pytest.mark.parametrize("options", variants((), REDIRECT), ids=str)
def test_a_port_forward(lab: Lab, options: tuple[str, ...]) -> None:
    """The relay connects to the address that the client asked for, from the router itself, and a rule in prerouting
    does not see that. The same rule in output does."""
    trials.with_port_forward(lab)
    assert seen(lab, to_the_host) == ["served"]
    with lab.relay_process(*INBOUND, *options) as relay:
        assert seen(lab, to_the_host) == ["reset"]
        twin(lab, "iptables-nft", lab.relay.ipv4, lab.server.ipv4)
        twin(lab, "ip6tables-nft", lab.relay.ipv6, lab.server.ipv6)
        assert seen(lab, to_the_host) == ["served"]
        wait_until(lambda: len(relay.records()) == 4, "all were relayed")


def test_redirects(lab: Lab) -> None:
    """A router tells clients of its own network that there is a shorter way, as soon as it has passed on anything not
    meant for the relay. They take it, and are relayed no more, also under `closed`."""
    trials.with_one_arm(lab)
    assert trials.after_some_datagrams(lab) == "served"
    lab.client.run(["ip", "route", "flush", "cache"])
    with lab.relay_process(*INBOUND, "--on-failure", "closed") as relay:
        assert trials.across_one_arm(lab) == "served"
        relay.wait_for_record(lambda record: True)
        assert trials.after_some_datagrams(lab) == "served"
        relay.stop()
        assert len(relay.records()) == 1


@pytest.mark.parametrize("said_by", ["check", pytest.param("manual", marks=pytest.mark.slow)])
def test_no_redirects(lab: Lab, said_by: str) -> None:
    """The remedy."""
    trials.with_one_arm(lab)
    (found,) = [one for one in findings(lab, *INBOUND) if one["name"] == "redirects"]
    assert found["level"] == "warning"
    manual = block("interception.rst", "no-redirects").replace("eth0", "br0")
    lab.relay.run(["sh", "-c", found["remedy"] if said_by == "check" else manual])
    with lab.relay_process(*INBOUND) as relay:
        assert trials.after_some_datagrams(lab) == "served"
        relay.wait_for_record(lambda record: True)


# --- addresses


def test_reserved_addresses(lab: Lab) -> None:
    """They are denied, also behind NAT64, because to most hosts they mean nothing good. Who has such servers
    says so."""
    trials.with_reserved_addresses(lab)
    assert seen(lab, trials.reserved) == ["served"]
    assert relayed(lab, trials.reserved, *INBOUND) == ["reset"]
    assert relayed(lab, trials.reserved, *INBOUND, "--allow", "240.0.0.0/4") == ["served"]


@pytest.mark.parametrize("options", variants((), ADDRESS, REDIRECT), ids=str)
def test_an_address_on_lo(lab: Lab, options: tuple[str, ...]) -> None:
    trials.with_address_on_lo(lab)
    here = EchoServer(lab.relay)
    try:
        assert seen(lab, trials.to_the_address_on_lo) == ["served"]
        assert relayed(lab, trials.to_the_address_on_lo, *INBOUND, *options) == ["served"]
    finally:
        here.close()


def test_a_new_address_without_a_relay(lab: Lab) -> None:
    assert seen(lab, trials.moves_to_a_new_address) == ["served, served, served"]


def test_a_new_address(lab: Lab) -> None:
    """Connections that the relay has made are bound to the address that it had; the client hears of it as soon as
    user-timeout says so. With preserve-source they have the client's."""
    bound = ("--user-timeout", "2")
    assert relayed(lab, trials.moves_to_a_new_address, *INBOUND, *bound, connections=4) == ["served, reset, served"]


@pytest.mark.slow
def test_a_new_address_and_a_preserved_source(lab: Lab) -> None:
    kept = relayed(lab, trials.moves_to_a_new_address, *INBOUND, *ADDRESS, connections=4)
    assert kept == ["served, served, served"]


# --- what is in a SYN


def test_synproxy_for_servers_behind_the_host(lab: Lab) -> None:
    """In forward it never sees what is relayed."""
    trials.with_synproxy(lab, "forward")
    assert seen(lab, gateway) == ["served"]
    assert relayed(lab, gateway, *INBOUND) == ["served"]


def test_synproxy_for_servers_on_the_host(lab: Lab) -> None:
    """In input it answers the SYN before the relay does, and connects to the server itself, which no rule of ours sees.
    Leave the ports that are intercepted out of it; the kernel's own SYN cookies do the same for the relay."""
    here = EchoServer(lab.relay)
    try:
        with lab.relay_process(*INBOUND) as relay:
            assert seen(lab, to_the_host) == ["served"]
            wait_until(lambda: len(relay.records()) == len(FAMILIES), "both are relayed")
            trials.with_synproxy(lab, "input")
            assert seen(lab, to_the_host) == ["served"]
            relay.stop()
            assert len(relay.records()) == len(FAMILIES)
    finally:
        here.close()


@pytest.mark.parametrize("backend", BACKEND_OPTIONS, ids=str)
def test_one_hop(lab: Lab, backend: tuple[str, ...]) -> None:
    """The connection ends at the relay: that is what it is for. A trace over TCP sees the server one hop away."""
    assert seen(lab, trials.with_one_hop) == ["unreachable"]
    assert relayed(lab, trials.with_one_hop, *INBOUND, *backend) == ["connected"]


@pytest.mark.parametrize("backend", BACKEND_OPTIONS, ids=str)
def test_fast_open(lab: Lab, backend: tuple[str, ...]) -> None:
    """The client has a cookie of the server's, from the time before. The relay does not know it, takes the SYN for an
    ordinary one, and the client sends its data again, a round trip later, as it does when the server has a new key."""
    trials.with_fast_open(lab)
    for family in FAMILIES.values():
        with trials.fast_open_server(lab, family):
            assert [trials.in_the_syn(lab, family) for _ in range(2)] == ["served", "served at once"]
            with lab.relay_process(*INBOUND, *backend) as relay:
                assert trials.in_the_syn(lab, family) == "served"
                assert relay.wait_for_record(lambda record: True)["outcome"] == "completed"


def test_the_same_port_over_udp(lab: Lab) -> None:
    """It goes direct, and is not touched."""
    assert seen(lab, trials.over_udp) == ["answered to the client"]
    assert relayed(lab, trials.over_udp, *INBOUND, connections=0) == ["answered to the client"]


def test_signed_segments(lab: Lab) -> None:
    """The relay has no key, and the kernel drops a SYN that is signed with one it does not know."""
    assert seen(lab, trials.signed) == ["connected"]
    assert relayed(lab, trials.signed, *INBOUND, connections=0) == ["no answer"]
    assert relayed(lab, trials.signed, "--intercept-inbound", str(PORT), connections=0) == ["connected"]


# --- who the client is


def test_a_client_from_a_low_port(lab: Lab) -> None:
    """`full` keeps a port below 1024 only if any program may take one: the workers have no capability for it."""
    trials.with_low_ports(lab.client)
    assert seen(lab, trials.from_a_low_port) == ["trusted"]
    with lab.relay_process(*INBOUND, "--preserve-source", "full") as relay:
        assert seen(lab, trials.from_a_low_port) == ["not trusted"]
        trials.with_low_ports(lab.relay)
        assert seen(lab, trials.from_a_low_port) == ["trusted"]
        wait_until(lambda: len(relay.records()) == 4, "all were relayed")


# --- time


@pytest.mark.slow
def test_a_table_that_forgets(lab: Lab) -> None:
    """Outbound connections are known by their entry in conntrack's table. Keepalive renews it if it comes in time, and
    the default of 60 s does unless the table forgets within a minute."""
    trials.with_short_memory(lab)
    assert seen(lab, trials.after_a_pause) == ["served, served"]
    assert relayed(lab, trials.after_a_pause, *OUTBOUND, "--keepalive", "1") == ["served, served"]


@pytest.mark.parametrize("options", variants((), ADDRESS, REDIRECT), ids=str)
def test_the_server_speaks_first(lab: Lab, options: tuple[str, ...]) -> None:
    assert seen(lab, trials.greeted) == ["220 welcome"]
    assert relayed(lab, trials.greeted, *INBOUND, *options) == ["220 welcome"]


@pytest.mark.slow
def test_a_relay_that_is_frozen_for_a_while(lab: Lab) -> None:
    """As `docker pause` does it, for longer than stall-timeout: nothing is taken for stuck afterwards."""
    with lab.relay_process(*INBOUND, "--stall-timeout", "1") as relay:
        with lab.client.connect(lab.server.ipv4, PORT) as sock:
            assert trials.echoed(sock) == "served"
            os.killpg(relay.pid, signal.SIGSTOP)
            time.sleep(FROZEN)
            os.killpg(relay.pid, signal.SIGCONT)
            with pytest.raises(LabError):
                relay.wait_for_line(lambda line: line.get("level") in ("warning", "error"), SUSPICION)
            assert trials.echoed(sock) == "served"
        assert gateway(lab, FAMILIES["v4"]) == "served"
        relay.stop()
