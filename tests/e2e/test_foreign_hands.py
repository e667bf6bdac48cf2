"""Killed under load, and flushed by others: how soon all is well again, and what the log says of it."""

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from deadlines import wait_until
from interception import (
    BACKENDS,
    BOTH_WAYS,
    FAMILIES,
    PORT,
    attempt,
    echo_servers,
    furnish,
    look,
    opened,
    ping,
    processes,
    ways,
)

from tproxy_relay.lab import Host, Lab, LabError, RelayProcess

DIRECT = {"nft": 0.1, "iptables-nft": 1.0, "iptables-legacy": 1.0}
"""Seconds after kill -9 until every new connection goes direct."""
TRIES = 3
"""The quickest counts: another program may have the processor."""
RESTORED = 5.0
QUIET = 2.5
"""Seconds in which a watch that does not believe its own work would warn again."""


def cells(lab: Lab) -> dict[str, tuple[Host, Host, int]]:
    """Who connects to whom, in each topology and family."""
    return {
        f"{way}, {name}": (client, server, family)
        for way, (client, server) in ways(lab).items()
        for name, family in FAMILIES.items()
    }


def all_work(lab: Lab, relay: RelayProcess | None = None) -> None:
    """New connections in each cell, all intercepted by this relay if there is one."""
    before = opened(relay) if relay else 0
    faults = {cell: fault for cell, ends in cells(lab).items() if (fault := attempt(*ends))}
    assert not faults
    if relay:
        wait_until(lambda: opened(relay) >= before + len(cells(lab)), "all are intercepted")


# --- killed in mid-traffic


class Flood:
    """A connection on which bytes go round without a pause; `fault` is how it ended."""

    def __init__(self, client: Host, server: Host, family: int) -> None:
        self.sock = client.connect(server.address(family), PORT)
        self.rounds = 0
        self.fault = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.fault:
            self.fault = ping(self.sock)
            self.rounds += 1

    def end(self) -> str:
        """Wait for it; the fault."""
        self._thread.join(15)
        self.sock.close()
        return self.fault or "it did not end"


class Probe:
    """New connections one after the other, until the server sees the client's own address; `took` is how long that was
    after `since`."""

    def __init__(self, client: Host, server: Host, family: int) -> None:
        self._ends = client, server.address(family)
        self.took = 0.0
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        client, address = self._ends
        while time.monotonic() - self._since < 10:
            with contextlib.suppress(OSError), client.connect(address, PORT, timeout=0.05) as sock:
                if ping(sock) == "":
                    self.took = time.monotonic() - self._since
                    return

    def seconds(self) -> float:
        """Wait for it."""
        self._thread.join(20)
        return self.took or float("inf")


def slowest_after_kill(lab: Lab, backend: str) -> float:
    """Seconds from kill -9 until the last cell goes direct. What was relayed is reset, never ended as if complete."""
    with lab.relay_process(*BOTH_WAYS, "--backend", backend) as relay:
        floods = {cell: Flood(*ends) for cell, ends in cells(lab).items()}
        wait_until(lambda: all(flood.rounds > 2 for flood in floods.values()), "bytes go round in all of them")
        wait_until(lambda: opened(relay) == len(floods), "all are intercepted")
        os.kill(relay.pid, signal.SIGKILL)
        probes = [Probe(*ends) for ends in cells(lab).values()]
        slowest = max(probe.seconds() for probe in probes)
        for cell, flood in floods.items():
            assert "Reset" in (fault := flood.end()) or "BrokenPipe" in fault, f"{cell}: {fault}"
        wait_until(lambda: not processes(lab, "-m tproxy_relay.guard"), "the guard has done its work")
    return slowest


@pytest.mark.parametrize("backend", [pytest.param(b, marks=[] if b == "nft" else pytest.mark.slow) for b in BACKENDS])
def test_killed_in_mid_traffic(fresh_lab: Lab, backend: str) -> None:
    furnish(fresh_lab)
    before = look(fresh_lab)
    times: list[float] = []
    with echo_servers(fresh_lab):
        while not times or (min(times) > DIRECT[backend] and len(times) < TRIES):
            times.append(slowest_after_kill(fresh_lab, backend))
            assert look(fresh_lab) == before
    assert min(times) <= DIRECT[backend], times


# --- flushed by others

HANDS = [
    ("nft", ("--on-failure", "closed"), "nft flush ruleset"),
    ("nft", ("--on-failure", "closed"), "nft delete table inet tproxy_relay"),
    ("nft", ("--on-failure", "closed"), "nft flush chain inet tproxy_relay prerouting"),
    ("nft", ("--on-failure", "closed", "--mode", "redirect"), "nft flush ruleset"),
    ("nft", (), "for f in -4 -6; do for p in 7006 7006 7007 7008; do ip $f rule del pref $p; done; done"),
    ("nft", (), "ip route flush table 7006; ip -6 route flush table 7006"),
    ("nft", (), "ip rule flush; ip rule add pref 32766 lookup main; ip rule add pref 32767 lookup default"),
    ("iptables-nft", (), "iptables-nft -t mangle -F; ip6tables-nft -t mangle -F"),
    ("iptables-nft", (), "nft flush ruleset"),
    ("iptables-nft", (), "iptables-nft -t mangle -D PREROUTING 1"),
    ("iptables-nft", ("--mode", "redirect"), "iptables-nft -t nat -F PREROUTING"),
    ("iptables-legacy", (), "iptables-legacy -t mangle -F; ip6tables-legacy -t mangle -F"),
    ("iptables-legacy", (), "ip6tables-legacy -t mangle -F TPROXY_RELAY_PRE"),
    ("iptables-legacy", ("--mode", "redirect"), "ip6tables-legacy -t nat -F; iptables-legacy -t nat -F"),
    (
        "iptables-legacy",
        (),
        "iptables-legacy-restore < /dev/null; printf '*mangle\\nCOMMIT\\n' | iptables-legacy-restore",
    ),
]


def hands() -> Iterator[object]:
    for backend, options, command in HANDS:
        yield pytest.param(
            backend,
            options,
            command,
            id=" ".join((backend, *options, "/", command)),
        )


def warnings(relay: RelayProcess) -> list[object]:
    """What was restored, by the log."""
    return [line["what"] for line in relay.lines() if line["message"] == "ruleset restored"]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "options", "command"), list(hands()))
def test_flushed_rules_are_back_soon_with_one_warning(
    fresh_lab: Lab, backend: str, options: tuple[str, ...], command: str
) -> None:
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--backend", backend, *options) as relay:
        all_work(lab, relay)
        installed = ours(lab)
        with lab.client.connect(lab.server.ipv4, PORT) as carried:
            assert ping(carried) == ""
            wait_until(lambda: "unacked" not in lab.relay.run(["ss", "-tin"]).stdout, "no packet is on its way")
            lab.relay.run(["sh", "-c", command])
            assert ours(lab) != installed, "the control: it is gone"
            wait_until(lambda: ours(lab) == installed, "it is back", RESTORED)
            wait_until(lambda: bool(warnings(relay)), "the log says so")
            all_work(lab, relay)
            assert ping(carried) == "", "a silent connection has not noticed"
        with contextlib.suppress(LabError):
            relay.wait_for_line(lambda line: len(warnings(relay)) > 1, QUIET)
        assert len(warnings(relay)) == 1
        relay.stop()


def ours(lab: Lab) -> list[str]:
    """In any order, without counters: what was flushed comes back behind that of others. And without the note of what
    iptables-nft had to make for us, which is already there when it comes back."""
    listing = [re.sub(' made=[^"]*', "", line) for line in look(lab).splitlines()]
    lines = [line.partition(" counter")[0] for line in listing if "TPROXY_RELAY" in line or " proto 206" in line]
    table = lab.relay.run(["nft", "-s", "list", "table", "inet", "tproxy_relay"], check=False).stdout
    return sorted(lines) + table.splitlines()


def test_what_comes_back_while_draining_is_the_draining_ruleset(fresh_lab: Lab) -> None:
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--on-failure", "closed") as relay:
        with lab.client.connect(lab.server.ipv4, PORT) as carried:
            assert ping(carried) == ""
            relay.terminate()
            relay.wait_for_line(lambda line: line["message"] == "draining")
            installed = ours(lab)
            lab.relay.run(["nft", "flush", "ruleset"])
            wait_until(lambda: ours(lab) == installed, "it is back", RESTORED)
            all_work(lab)
            assert ping(carried) == ""
            carried.shutdown(socket.SHUT_WR)
            assert carried.recv(1) == b""
        assert relay.wait() == 0
        assert opened(relay) == 1, "the new ones went direct"
    assert ours(lab) == []


@pytest.mark.slow
def test_many_flushes_end_well(fresh_lab: Lab) -> None:
    """Changes come in bursts; the watch neither tires nor floods the log."""
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--backend", "iptables-nft") as relay:
        installed = ours(lab)
        for _ in range(20):
            lab.relay.run(["nft", "flush", "ruleset"])
            lab.relay.run(["ip", "-6", "route", "flush", "table", "7006"])
        wait_until(lambda: ours(lab) == installed, "it is back", RESTORED)
        all_work(lab, relay)
        assert 1 <= len(warnings(relay)) <= 5
        relay.stop()


# --- the marks of others


@pytest.mark.parametrize("backend", BACKENDS)
def test_clients_are_served_where_another_saves_every_mark_in_conntrack(fresh_lab: Lab, backend: str) -> None:
    """The relay's connections to servers then have its mark there, too. Programs on its host are not served: `check`
    says so (tests/support/neighbour_cases.py)."""
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--backend", backend) as relay:
        for program in ("iptables-nft", "ip6tables-nft"):
            lab.relay.run([program, "-t", "mangle", "-A", "POSTROUTING", "-j", "CONNMARK", "--save-mark"])
        for way in ("gateway", "host"):
            client, server = ways(lab)[way]
            for family in FAMILIES.values():
                with client.connect(server.address(family), PORT) as sock:
                    assert [ping(sock) for _ in range(3)] == ["", "", ""], way
                    sock.shutdown(socket.SHUT_WR)
                    assert relay.record_of(sock)["outcome"] == "completed"
