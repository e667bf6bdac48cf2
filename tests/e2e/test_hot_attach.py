"""The ruleset comes and goes under live connections, and none of them notices.

Connections older than the ruleset run through all of its life; intercepted ones outlive its draining; and new ones go
where they should at each moment.
"""

import hashlib
import os
import threading
import time
from collections.abc import Callable

import pytest
from deadlines import wait_until
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, attempt, echo_servers, opened, ping, processes, ways
from rows import Seen

from tproxy_relay.lab import Lab

MODES = [(backend, mode) for backend in BACKENDS for mode in ("tproxy", "redirect")]
EACH = 5
"""Connections for each way and family."""


class Old:
    """Connections that were there before: through the relay's host, to it, from it, and within it."""

    def __init__(self, lab: Lab) -> None:
        ends = {**ways(lab), "within": (lab.relay, lab.relay)}
        self._all = [
            (way, source.connect(destination.address(family), PORT))
            for way, (source, destination) in ends.items()
            for family in FAMILIES.values()
            for _ in range(EACH)
        ]

    def check(self, when: str) -> None:
        broken = [(way, fault) for way, sock in self._all if (fault := ping(sock))]
        assert not broken, f"{when}: {len(broken)} of {len(self._all)} broken: {broken[:3]}"

    def close(self) -> None:
        for _, sock in self._all:
            sock.close()


@pytest.mark.parametrize(
    ("backend", "mode"),
    [pytest.param(*pair, marks=[] if pair == ("nft", "tproxy") else pytest.mark.slow) for pair in MODES],
)
def test_a_whole_life_breaks_no_connection(fresh_lab: Lab, backend: str, mode: str) -> None:
    lab = fresh_lab
    with echo_servers(lab) as servers:
        old = Old(lab)
        old.check("before")
        with lab.relay_process(*BOTH_WAYS, "--backend", backend, "--mode", mode) as relay:
            old.check("with the ruleset")
            assert opened(relay) == 0
            ours = [
                source.connect(destination.address(family), PORT)
                for source, destination in ways(lab).values()
                for family in FAMILIES.values()
            ]
            assert not list(filter(None, map(ping, ours)))
            wait_until(lambda: opened(relay) == len(ours), "they are intercepted")
            relay.signal(15)
            relay.wait_for_line(lambda line: line["message"] == "draining")
            old.check("draining")
            assert not list(filter(None, map(ping, ours)))
            seen = {name: len(server.peers) for name, server in servers.items()}
            for way, (source, destination) in ways(lab).items():
                for family in FAMILIES.values():
                    assert attempt(source, destination, family) == "", f"{way}: a new one while draining"
            assert opened(relay) == len(ours), "a new one was intercepted while draining"
            assert len(servers["server"].peers) == seen["server"] + 4
            for sock in ours:
                sock.close()
            relay.wait_for_line(lambda line: line["message"] == "ruleset removed")
            assert {record["outcome"] for record in relay.records()} == {"completed"}
        old.check("removed")
        old.close()


@pytest.mark.parametrize("backend", ["nft", pytest.param("iptables-legacy", marks=pytest.mark.slow)])
def test_by_hand_too(fresh_lab: Lab, backend: str, rules: Callable[..., str]) -> None:
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process() as relay:
        old = Old(lab)
        rules(lab, "apply", "--backend", backend)
        old.check("applied")
        with lab.client.connect(lab.server.ipv4, PORT) as sock:
            assert ping(sock) == ""
            wait_until(lambda: opened(relay) == 1, "it is intercepted")
        rules(lab, "remove")
        old.check("removed")
        old.close()


@pytest.mark.parametrize("way", ["gateway", pytest.param("local", marks=pytest.mark.slow)])
def test_transfers_under_way_are_completed(fresh_lab: Lab, way: str) -> None:
    """50 of them; half of each comes after TERM."""
    lab, count, half = fresh_lab, 50, os.urandom(1_000_000)
    source, destination = ways(lab)[way]
    went_on = threading.Event()
    digests: list[str] = []

    def serve(sock: "object") -> None:
        with sock:  # type: ignore[attr-defined]
            sock.sendall(half)  # type: ignore[attr-defined]
            went_on.wait(30)
            sock.sendall(half)  # type: ignore[attr-defined]

    with destination.listen(PORT) as listener, lab.relay_process(*BOTH_WAYS) as relay:
        clients = [source.connect(destination.ipv4, PORT) for _ in range(count)]
        for _ in clients:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
        wait_until(lambda: opened(relay) == count, "all are intercepted")
        relay.signal(15)
        relay.wait_for_line(lambda line: line["message"] == "draining")
        with source.connect(destination.ipv4, PORT) as direct:
            accepted, peer = listener.accept()
            assert peer == direct.getsockname(), "a new one goes direct"
            accepted.close()
        went_on.set()
        for client in clients:
            got = hashlib.sha256()
            while data := client.recv(65536):
                got.update(data)
            digests.append(got.hexdigest())
            client.close()
        relay.wait_for_line(lambda line: line["message"] == "ruleset removed")
        outcomes = [record["outcome"] for record in relay.records()]
    assert digests == [hashlib.sha256(half + half).hexdigest()] * count
    assert outcomes == ["completed"] * count


@pytest.mark.row(
    "H6", "TERM with live connections", "those that end in time are clean, the others reset at drain-timeout"
)
def test_nothing_is_reset_before_the_drain_timeout(lab: Lab, seen: Seen) -> None:
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--drain-timeout", "2") as relay:
        with lab.client.connect(lab.server.ipv4, PORT) as sock:
            assert ping(sock) == ""
            relay.signal(15)
            relay.wait_for_line(lambda line: line["message"] == "draining")
            began = time.monotonic()
            while not (fault := ping(sock)):
                assert time.monotonic() - began < 10
                time.sleep(0.02)
            assert time.monotonic() - began > 1.8 and "ConnectionResetError" in fault
        wait_until(lambda: not processes(lab, "-m tproxy_relay.guard"), "the guard ends too")
        assert relay.records()[0]["outcome"] == "drained"
    seen("as wanted")
