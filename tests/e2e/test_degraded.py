"""Others change the host of a running relay: it mends what is its own matter, and says the rest with what mends it.

That connections are lost, and come again, is shown by connections.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from deadlines import wait_until
from doctors import Doctor
from half_open import SOURCES, half_open, lead_to_nobody
from health_views import SOON, is_ok, names, status, status_once
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, EchoServer, ping, processes
from neighbour_cases import BY_NFT, PREROUTING, TAILSCALE, by_iptables, docker
from neighbour_trials import LOST, RELAYED, Neighbour, chain, seen, spoil

from tproxy_relay.lab import Lab, RelayProcess

pytestmark = pytest.mark.slow

NAMED = ("strict reverse path", "marks restored on arrival", "marks restored on arrival, source kept", "marks by turns")
NAMED += ("marks restored on the way out", "no tracking of what programs here send")
NAMED += ("no tracking to a server here, source kept",)

NOBODY_KNOWS = chain("filter hook input priority -10", "tcp dport 8000 numgen inc mod 1 == 0 drop")
"""A filter that is not understood: `check` cannot say that it drops everything."""


@contextlib.contextmanager
def serving(lab: Lab, *options: str, at_relay: bool = False) -> Iterator[RelayProcess]:
    """A relay that looks, and tries nothing unless it is told to; a server; all is well."""
    server = EchoServer(lab.relay if at_relay else lab.server)
    try:
        with lab.relay_process(*options) as relay:
            status_once(lab, is_ok, "it is well", 3 * SOON)
            yield relay
    finally:
        server.close()


def relayed(lab: Lab, ways: tuple[str, ...]) -> bool:
    return all(seen(lab, way, family) == RELAYED for way in ways for family in FAMILIES)


def published(lab: Lab, family: int) -> str:
    """What a client sees of the container."""
    try:
        with lab.client.connect(lab.relay.address(family), PORT, 1.2) as sock:
            sock.settimeout(1.2)
            return ping(sock)
    except OSError as error:
        return repr(error)


def options_of(neighbour: Neighbour, backend: str) -> tuple[str, ...]:
    inbound_only = "--intercept-inbound" in neighbour.options
    return (*(() if inbound_only else BOTH_WAYS), *neighbour.options, "--backend", backend)


def named_and_mended(lab: Lab, doctor: Doctor, neighbour: Neighbour, backend: str) -> None:
    at_relay = "host" in neighbour.harms
    with serving(lab, *options_of(neighbour, backend), at_relay=at_relay) as relay:
        assert relayed(lab, neighbour.harms)
        spoil(lab, neighbour.how)
        ill = status_once(lab, lambda now: neighbour.finding in names(now), "it names who is in the way")
        assert ill["health"] == "degraded" and "; do: " in ill["complaints"][0]
        assert relay.wait_for_line(lambda line: line["message"] == "degraded" and line["problem"] == neighbour.finding)
        for _ in range(4):  # a rule for each family has a remedy for each
            for one in ill["problems"]:
                doctor.shell(one["remedy"])
            with contextlib.suppress(AssertionError):
                status_once(lab, is_ok, "it is well again")
                break
            ill = status(lab)
        assert is_ok(status(lab)) and relayed(lab, neighbour.harms)
        assert relay.wait_for_line(lambda line: line["message"] == "no longer degraded")
        doctor.shell(neighbour.keeps or "true")


@pytest.mark.parametrize("neighbour", [one for one in BY_NFT if one.name in NAMED], ids=lambda one: one.name)
def test_who_is_in_the_way_is_named(fresh_lab: Lab, doctor: Doctor, neighbour: Neighbour) -> None:
    named_and_mended(fresh_lab, doctor, neighbour, "nft")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("program", BACKENDS[1:])
def test_who_does_not_track_by_iptables_is_named(fresh_lab: Lab, doctor: Doctor, program: str, backend: str) -> None:
    named_and_mended(fresh_lab, doctor, by_iptables(program)[2], backend)


@pytest.mark.parametrize("program", BACKENDS[1:])
def test_who_restores_marks_by_iptables_is_named(fresh_lab: Lab, doctor: Doctor, program: str) -> None:
    """The relay's own rules by iptables do not mind."""
    named_and_mended(fresh_lab, doctor, by_iptables(program)[0], "nft")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_of_routing_that_catches_everything_is_gone_round(fresh_lab: Lab, backend: str) -> None:
    with serving(fresh_lab, *BOTH_WAYS, "--backend", backend) as relay:
        assert relayed(fresh_lab, ("gateway", "local"))
        spoil(fresh_lab, TAILSCALE)
        wait_until(lambda: relayed(fresh_lab, ("gateway", "local")), "it is mended", SOON)
        line = relay.wait_for_line(lambda line: line["message"] == "ruleset planned again")
        assert "from 7006 to 5267" in line["why"]
        status_once(fresh_lab, is_ok, "and all is well")
        spoil(fresh_lab, ("ip rule del pref 5270", "ip -6 rule del pref 5270"))
        relay.wait_for_line(lambda line: "from 5267 to 7006" in line.get("why", ""))
        relay.stop()
    for family in ("-4", "-6"):
        assert "206" not in fresh_lab.relay.run(["ip", family, "rule"]).stdout, "wherever they were"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("program", BACKENDS)
def test_a_port_that_is_published_later_is_planned_round(
    fresh_lab: Lab, doctor: Doctor, program: str, backend: str
) -> None:
    """With iptables there is a place before the rules of the same program only: others are told."""
    with serving(fresh_lab, "--intercept-inbound", str(PORT), "--backend", backend) as relay:
        before = EchoServer(fresh_lab.relay)  # else nobody is there before the container
        assert [published(fresh_lab, family) for family in FAMILIES.values()] == ["", ""]
        before.close()
        spoil(fresh_lab, docker(program))
        if backend not in ("nft", program):
            ill = status_once(fresh_lab, lambda now: len(now["problems"]) == 2, "it names who is in the way")
            assert names(ill) == {"nat"}
            for one in ill["problems"]:
                doctor.shell(one["remedy"])
        families = FAMILIES.values()
        wait_until(lambda: [published(fresh_lab, one) for one in families] == ["", ""], "it is mended", SOON)
        relay.wait_for_line(lambda line: "rewrites destinations" in line.get("why", ""))
        name = str(fresh_lab.client.address())
        relay.wait_for_record(lambda line: line["client"].startswith(name) and line["outcome"] == "completed")
        status_once(fresh_lab, is_ok, "and all is well")


def test_what_nobody_knows_is_shown_by_a_connection(fresh_lab: Lab) -> None:
    with serving(fresh_lab, *BOTH_WAYS, "--self-probe", "600") as relay:
        status_once(fresh_lab, lambda now: now["self_probe"], "a connection was tried", 4 * SOON)
        spoil(fresh_lab, (NOBODY_KNOWS,))
        assert seen(fresh_lab, "gateway", "v4") == LOST
        ill = status_once(fresh_lab, lambda now: "self-probe" in names(now), "a connection was lost", 2 * SOON)
        assert any("connection to port 8000 is lost" in one for one in ill["complaints"])
        spoil(fresh_lab, ("nft delete table inet neighbour",))
        status_once(fresh_lab, is_ok, "it is well again", 2 * SOON)
        tried = [line for line in relay.lines() if line.get("self_probe")]
        assert tried and {line["levelname"] for line in tried} == {"DEBUG"}
        assert not [line for line in relay.records() if line["levelname"] != "DEBUG" and "192.0.2." in line["client"]]


def test_connections_that_do_not_come_are_missed_where_none_can_be_tried(fresh_lab: Lab) -> None:
    with serving(fresh_lab, "--intercept-inbound", str(PORT)):
        spoil(fresh_lab, (NOBODY_KNOWS,))
        clients = [lost_client(fresh_lab) for _ in range(6)]
        ill = status_once(fresh_lab, lambda now: names(now), "they are missed", 4 * SOON)
        assert names(ill) == {"missing-connections"}
        assert "were taken by the rules, and none came" in ill["complaints"][0]
        for client in clients:
            client.close()
        spoil(fresh_lab, ("nft delete table inet neighbour",))
        wait_until(lambda: relayed(fresh_lab, ("gateway",)), "clients come again", SOON)
        status_once(fresh_lab, is_ok, "it is well again", 2 * SOON)


def test_connections_that_do_not_come_by_an_interface_are_missed(fresh_lab: Lab) -> None:
    """The one that is tried comes, by an interface of its own."""

    def missed(now: dict[str, Any]) -> bool:
        return names(now) == {"missing-connections"} and all("is relayed" in one for one in now["self_probe"]["found"])

    with serving(fresh_lab, "--intercept-inbound", str(PORT), "--self-probe", "600"), contextlib.ExitStack() as stack:
        status_once(fresh_lab, lambda now: now["self_probe"], "a connection was tried", 4 * SOON)
        rule = "iifname rc tcp dport 8000 numgen inc mod 1 == 0 drop"
        spoil(fresh_lab, (chain("filter hook input priority -10", rule),))
        for _ in range(6):
            stack.enter_context(lost_client(fresh_lab))
        ill = status_once(fresh_lab, missed, "they are missed", 6 * SOON)
        assert "what comes by other interfaces" in ill["complaints"][0]
        before = ill["self_probe"]["time"]
        status_once(
            fresh_lab, lambda now: missed(now) and now["self_probe"]["time"] > before, "after one more, too", 6 * SOON
        )
        stack.close()
        spoil(fresh_lab, ("nft delete table inet neighbour",))
        status_once(fresh_lab, is_ok, "it is well again", 4 * SOON)


@pytest.mark.parametrize("probe", ["0", "600"])
@pytest.mark.parametrize("kind", ["deaf", "resets"])
def test_scanners_are_no_reason_to_complain(fresh_lab: Lab, kind: str, probe: str) -> None:
    """Their SYNs come, and nothing more; or they take them back."""
    with serving(fresh_lab, "--intercept-inbound", str(PORT), "--self-probe", probe) as relay:
        if probe != "0":
            status_once(fresh_lab, lambda now: now["self_probe"], "a connection was tried", 4 * SOON)
        lead_to_nobody(fresh_lab)
        if kind == "resets":
            fresh_lab.client.run(["ip", "route", "add", "local", SOURCES[socket.AF_INET], "dev", "lo"])
        lines = len(relay.lines())
        until = time.monotonic() + 3 * SOON
        while time.monotonic() < until:
            half_open(fresh_lab, fresh_lab.server.address(), 4)
            assert is_ok(status(fresh_lab))
        assert not [line for line in relay.lines()[lines:] if line["message"] == "degraded"]


def lost_client(lab: Lab) -> socket.socket:
    """One that goes on asking for a connection."""
    client = lab.client.socket(socket.AF_INET)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        client.connect((lab.server.address(), PORT))
    return client


def test_a_healthy_relay_that_is_idle_is_never_degraded(fresh_lab: Lab) -> None:
    with serving(fresh_lab, *BOTH_WAYS, "--self-probe", "5") as relay:
        for number in (1, 2, 3):
            relay.wait_for_line(lambda line: line.get("message") == "connection closed", 3 * SOON)
            wait_until(lambda: len(relay.records()) >= 4 * number, "four connections are tried", 3 * SOON)
            assert is_ok(status(fresh_lab))
        assert all(record["self_probe"] and record["levelname"] == "DEBUG" for record in relay.records())
        assert not [line for line in relay.lines() if line["levelname"] in ("WARNING", "ERROR")]
        found = status(fresh_lab)["self_probe"]["found"]
        assert len(found) == 4 and all("is relayed" in one for one in found)


def test_a_connection_that_the_settings_refuse_has_come(fresh_lab: Lab) -> None:
    with serving(fresh_lab, *BOTH_WAYS, "--deny", "192.0.2.0/24,2001:db8::/32", "--self-probe", "5") as relay:
        now = status_once(fresh_lab, lambda now: now["self_probe"], "a connection was tried", 4 * SOON)
        assert is_ok(now)
        assert {one.partition(" comes ")[2] for one in now["self_probe"]["found"]} == {
            "to the relay, whose settings refuse it"
        }
        assert relay.records()[0]["outcome"] == "denied" and now["last_refused"] == []


@pytest.mark.parametrize("whom", ["doctor", "relay"])
def test_who_is_killed_while_trying_leaves_nothing(fresh_lab: Lab, whom: str) -> None:
    with serving(fresh_lab, *BOTH_WAYS, "--self-probe", "1") as relay:
        spoil(fresh_lab, (chain(PREROUTING, "tcp dport 8000 numgen inc mod 1 == 0 drop"),))  # so that it takes a while
        wait_until(lambda: len(probe_links(fresh_lab)) == 2, "it is trying", 4 * SOON)
        links = probe_links(fresh_lab)
        victims = processes(fresh_lab, "tproxy_relay.check") if whom == "doctor" else [relay.pid]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        if whom == "relay":
            relay.wait()
        assert victims
        wait_until(lambda: not links & probe_links(fresh_lab), "its links are gone", SOON)


def probe_links(lab: Lab) -> set[str]:
    """By their numbers: the next one to try makes others."""
    lines = lab.relay.run(["ip", "-o", "link"]).stdout.splitlines()
    return {line.partition(":")[0] for line in lines if "tprchk" in line}
