"""Thousands of connections at once, tens of thousands one after the other: all served, nothing kept."""

import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest
from rows import Seen
from swarm import Script, come_and_go, echo_server

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

pytestmark = pytest.mark.alone

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
PORT = 8000
REST = 15.0
"""Seconds in which a relay without connections must have given everything back; it takes about two."""
KIB_EACH = 64
"""Resident memory that a resting connection may cost, with both its threads."""


@dataclass(frozen=True)
class Footprint:
    """What a process holds."""

    descriptors: int
    threads: int
    rss_kib: int

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        status = Path(f"/proc/{pid}/status").read_text()
        rss = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
        return cls(len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), int(rss))

    def is_back_at(self, start: "Footprint") -> bool:
        return abs(self.descriptors - start.descriptors) <= 2 and abs(self.threads - start.threads) <= 2


def wait_for_rest(relay: RelayProcess, start: Footprint) -> Footprint:
    """The relay's footprint when it is what it was at the start."""
    deadline = time.monotonic() + REST
    while not (now := Footprint.of(relay.worker)).is_back_at(start):
        assert time.monotonic() < deadline, f"not given back after {REST:g} s: {now}, at the start {start}"
        time.sleep(0.05)
    return now


def require_descriptors(wanted: int, require_or_skip: Callable[[str], NoReturn]) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        require_or_skip(f"the hard limit of descriptors is {hard}, and {wanted} are needed: ulimit -Hn")


def check_intercepted(lab: Lab, relay: RelayProcess, family: int, count: int) -> None:
    """All of them were intercepted, each one is recorded once, and each ended well."""
    host = f"[{lab.client.ipv6}]" if family == socket.AF_INET6 else lab.client.ipv4
    server = str(from_sockaddr((lab.server.address(family), PORT)))
    ours = [record for record in relay.records() if record["orig_dst"] == server]
    assert len(ours) == count
    assert all(record["client"].startswith(f"{host}:") for record in ours)
    assert len({record["id"] for record in ours}) == count, "ports of clients come again, ids never do"
    assert Counter(record["outcome"] for record in ours) == {"completed": count}


def check_sum(relay: RelayProcess, count: int) -> None:
    """What the relay itself says in the end: nothing forgotten, nothing counted twice."""
    relay.stop()
    stopped = relay.wait_for_line(lambda line: line["message"] == "stopped")
    assert stopped["accepted"] == count
    assert stopped["live"] == 0
    assert stopped["closed"] == {"completed": count}


def serve_all(lab: Lab, relay: RelayProcess, clients: Script, count: int, start: Footprint) -> Footprint:
    """All of them connect, are served, rest, are served again, and leave. The footprint while they rested."""
    assert clients.ask(f"open {count}")["errors"] == {}
    first = clients.ask("echo 64")
    assert (first["done"], first["errors"]) == (count, {})
    resting = Footprint.of(relay.worker)
    assert resting.descriptors >= start.descriptors + 2 * count, "they were not all in the relay at once"
    assert resting.threads >= 2 * count
    again = clients.ask("echo 64")
    assert (again["done"], again["errors"]) == (count, {})
    left = clients.ask("close")
    assert (left["done"], left["errors"]) == (count, {}), "no clean end"
    return resting


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_hundreds_of_connections_leave_nothing_behind(fresh_lab: Lab, family: int) -> None:
    lab, count = fresh_lab, 300
    lab.intercept((PORT,))
    with echo_server(lab.server, PORT, family), lab.relay_process() as relay:
        start = Footprint.of(relay.worker)
        with Script(lab.client, "hold", lab.server.address(family), PORT) as clients:
            serve_all(lab, relay, clients, count, start)
        wait_for_rest(relay, start)
        check_intercepted(lab, relay, family, count)
        check_sum(relay, count)


@pytest.mark.slow
@pytest.mark.row("L1", "2,000 connections, echo, rest, echo", "2,000 of 2,000; 64 KiB each")
@pytest.mark.row(
    "L2",
    "the same five times",
    "descriptors and threads back at the start +-2; memory of the 5th at most 1.1 of the 2nd",
)
def test_two_thousand_connections_five_times(
    fresh_lab: Lab, require_or_skip: Callable[[str], NoReturn], seen: Seen
) -> None:
    lab, count, rounds = fresh_lab, 2000, 5
    require_descriptors(2 * count + 100, require_or_skip)
    lab.intercept((PORT,))
    with echo_server(lab.server, PORT), lab.relay_process() as relay:
        start = Footprint.of(relay.worker)
        afterwards, each = [], []
        with Script(lab.client, "hold", lab.server.ipv4, PORT) as clients:
            for number in range(1, rounds + 1):
                resting = serve_all(lab, relay, clients, count, start)
                afterwards.append(wait_for_rest(relay, start))
                check_intercepted(lab, relay, socket.AF_INET, count * number)
                each.append((resting.rss_kib - start.rss_kib) / count)
                print(f"round {number}: {each[-1]:.1f} KiB each while resting; afterwards {afterwards[-1]}")
                assert each[-1] <= KIB_EACH
        assert afterwards[4].rss_kib <= 1.1 * afterwards[1].rss_kib, f"memory grows: {afterwards}"
        check_sum(relay, count * rounds)
    seen(f"2,000 of 2,000, at most {max(each):.0f} KiB each", "L1")
    seen(f"back each time; memory {afterwards[4].rss_kib / afterwards[1].rss_kib:.2f}", "L2")


@pytest.mark.slow
@pytest.mark.row("L3", "20,000 connections come and go", "no error; accepted = closed = 20,000")
def test_twenty_thousand_connections_one_after_the_other(fresh_lab: Lab, seen: Seen) -> None:
    lab, count = fresh_lab, 20_000
    lab.intercept((PORT,))
    with echo_server(lab.server, PORT), lab.relay_process() as relay:
        start = Footprint.of(relay.worker)
        answer = come_and_go(lab.client, lab.server.ipv4, PORT, count)
        print(f"{count / answer['seconds']:.0f} connections/s")
        assert (answer["done"], answer["errors"]) == (count, {})
        wait_for_rest(relay, start)
        check_intercepted(lab, relay, socket.AF_INET, count)
        check_sum(relay, count)
    seen("20,000 = 20,000, no error")
