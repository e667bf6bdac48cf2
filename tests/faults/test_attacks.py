"""Clients that want more than their share: more than there is room for, all at once, or for ever and silently."""

import contextlib
import socket
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from clients import Clients, EchoServer
from deadlines import wait_until
from exchanges import PATIENCE
from pairs import Pairs
from rows import Seen

from tproxy_relay.lab import Lab, RelayProcess

pytestmark = pytest.mark.alone

PORT = 8000
OTHER = "10.81.1.3"
"""Another address of the client's host."""


@pytest.fixture
def steered(fresh_lab: Lab) -> Lab:
    fresh_lab.intercept((PORT,))
    fresh_lab.client.run(["ip", "address", "add", f"{OTHER}/24", "dev", "cr"])
    return fresh_lab


def outcomes(relay: RelayProcess) -> Counter[str]:
    return Counter(record["outcome"] for record in relay.records())


def wait_for_outcomes(relay: RelayProcess, outcome: str, count: int) -> None:
    wait_until(lambda: outcomes(relay)[outcome] >= count, f"{count} x {outcome}")


@pytest.mark.row(
    "L7",
    "max-connections 100, 150 clients; wait",
    "100 served, 50 in the backlog and served later; a line of each worker at most",
)
def test_above_the_limit_clients_wait(steered: Lab, seen: Seen) -> None:
    options = ("--max-connections", "100", "--workers", "2")
    with steered.relay_process(*options) as relay, Pairs(steered, PORT) as pairs:
        clients = pairs.open(150)
        pairs.wait(lambda: sum(pair.served for pair in clients) == 100, "100 are served")
        relay.wait_for_line(lambda line: line["message"] == "not accepting")
        first = [pair for pair in clients if pair.served]
        assert len(first) == 100 and pairs.live_at_server == 100
        pairs.finish(first)
        pairs.wait(lambda: all(pair.served for pair in clients), "the others")
        lines = [line for line in relay.lines() if line["message"] == "not accepting"]
        assert 1 <= len(lines) <= 2 and pairs.most_at_server <= 100
        assert outcomes(relay)["completed"] <= 100 + 50
    seen("100 served, 50 waited and were served")


@pytest.mark.row("L7", "the same; when-full = refuse", "100 served, 50 reset within 1 s, 50 recorded")
def test_above_the_limit_clients_are_refused(steered: Lab, seen: Seen) -> None:
    options = ("--max-connections", "100", "--workers", "2", "--when-full", "refuse")
    with steered.relay_process(*options) as relay, Pairs(steered, PORT) as pairs:
        first = pairs.open_served(100)
        began = time.monotonic()
        others = pairs.open(50)
        pairs.wait(lambda: all(pair.client_saw for pair in others), "they are refused")
        took = time.monotonic() - began
        assert {pair.client_saw for pair in others} == {"ECONNRESET"} and took < 1
        wait_for_outcomes(relay, "over-limit", 50)
        pairs.go_on(first)
        assert pairs.most_at_server == 100
    seen(f"100 served, 50 reset within {took:.1f} s, 50 over-limit")


@pytest.mark.slow
@pytest.mark.row(
    "L11", "200 silent clients fill 200 places, then a good one; idle-timeout 5", "it is served when that ends"
)
def test_silent_clients_end_by_the_idle_timeout(steered: Lab, seen: Seen) -> None:
    with steered.relay_process("--max-connections", "200", "--idle-timeout", "5") as relay, EchoServer(steered, PORT):
        with silent(steered, 200) as began:
            good = waiting_client(steered)
            assert good.recv(4) == b"good"
            took = time.monotonic() - began
            good.close()
        assert took < 8
        wait_for_outcomes(relay, "idle", 1)
    seen(f"served after {took:.1f} s")


@pytest.mark.slow
@pytest.mark.row("L11", "the same; when-full = evict", "served within 2 s")
def test_silent_clients_are_evicted(steered: Lab, seen: Seen) -> None:
    with steered.relay_process("--max-connections", "200", "--when-full", "evict") as relay, EchoServer(steered, PORT):
        with silent(steered, 200) as began:
            good = waiting_client(steered)
            assert good.recv(4) == b"good"
            took = time.monotonic() - began
            good.close()
        assert took < 3
        assert 1 <= outcomes(relay)["evicted"] <= relay_workers(relay), outcomes(relay)
    seen(f"served after {took:.1f} s")


def relay_workers(relay: RelayProcess) -> int:
    return len(relay.workers)


@pytest.mark.row("L11", "200 silent clients, max-per-source 50, then a good one from elsewhere", "it is served at once")
@pytest.mark.row("S17", "one source wants 200 connections, max-per-source 50", "the 51st and more reset, others served")
def test_silent_clients_of_one_source(steered: Lab, seen: Seen) -> None:
    options = ("--max-connections", "200", "--max-per-source", "50")
    with steered.relay_process(*options) as relay, EchoServer(steered, PORT):
        with silent(steered, 200):
            wait_for_outcomes(relay, "over-limit", 150)
            began = time.monotonic()
            good = waiting_client(steered, OTHER)
            assert good.recv(4) == b"good"
            took = time.monotonic() - began
            good.close()
        assert took < 1
    seen(f"150 reset, the other source served after {took:.2f} s")


@pytest.mark.row(
    "S17", "one source opens 1,000 connections a second, max-rate-per-source 50", "50 a second; others served"
)
def test_a_source_that_opens_too_many(steered: Lab, seen: Seen) -> None:
    options = ("--max-rate-per-source", "50", "--workers", "2")
    with steered.relay_process(*options) as relay, EchoServer(steered, PORT):
        began, reset = time.monotonic(), 0
        for _ in range(1000):
            try:
                with steered.client.connect(steered.server.ipv4, PORT):
                    pass
            except ConnectionResetError:
                reset += 1
        seconds = time.monotonic() - began
        deadline = time.monotonic() + PATIENCE
        while sum(outcomes(relay).values()) < 1000 and time.monotonic() < deadline:
            time.sleep(0.02)
        served = 1000 - outcomes(relay)["over-limit"]
        assert 50 <= served <= 50 * (seconds + 1), outcomes(relay)
        good = waiting_client(steered, OTHER)
        assert good.recv(4) == b"good"
        good.close()
    seen("50 a second served, the others reset; another source served")


@contextlib.contextmanager
def silent(lab: Lab, count: int) -> Iterator[float]:
    """So many clients that connect and say nothing; when the last had connected."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(ConnectionResetError):
                stack.enter_context(lab.client.connect(lab.server.ipv4, PORT))
        yield time.monotonic()


def waiting_client(lab: Lab, source: str = "") -> socket.socket:
    """It has asked."""
    client = lab.client.socket()
    client.settimeout(PATIENCE)
    if source:
        client.bind((source, 0))
    client.connect((lab.server.ipv4, PORT))
    client.sendall(b"good")
    return client


@pytest.mark.slow
@pytest.mark.row("L10", "5,000 clients within a second", "no listen overflow; all served")
def test_a_burst_of_clients(steered: Lab, seen: Seen) -> None:
    """In two halves: a listener's backlog is 4,096, and each client is a descriptor here."""
    with steered.relay_process() as relay, EchoServer(steered, PORT):
        before = overflows(steered)
        served = 0
        for _ in range(2):
            with contextlib.closing(Clients(steered, PORT, 2500)) as clients:
                clients.watch(3 * PATIENCE)
                served += len(clients.served)
        lost = overflows(steered) - before
        relay.stop()
    assert (served, lost) == (5000, 0)
    seen(f"{served:,} served, {lost} overflows")


def overflows(lab: Lab) -> int:
    """TcpExtListenOverflows of the relay's host (proc_net(5): two lines, names and numbers)."""
    lines = lab.relay.run(["cat", "/proc/net/netstat"]).stdout.splitlines()
    names, numbers = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(numbers[names.index("ListenOverflows")])
