"""The kernel says no: errors of system calls, injected by strace(1) into a worker that is at work."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from clients import Clients, EchoServer
from exchanges import PATIENCE, see_reset
from relay_fixtures import intercepting_relay
from rows import Seen

from tproxy_relay.lab import Lab, RelayProcess

PORT = 8000
CLIENTS = 4

Need = Callable[[str], NoReturn]


@pytest.fixture(autouse=True)
def strace(require_or_skip: Need) -> None:
    if shutil.which("strace") is None:
        require_or_skip("strace is not installed")


relay = intercepting_relay((PORT,))


@contextlib.contextmanager
def injected(relay: RelayProcess, folder: Path, call: str, what: str) -> Iterator[Path]:
    """In all threads of the worker; the file in which each such call is noted."""
    notes = folder / "strace"
    command = ["strace", "-f", "-o", str(notes), "-e", f"trace={call}", "-e", f"inject={call}:{what}"]
    tracer = subprocess.Popen([*command, "-p", str(relay.worker)], stderr=subprocess.PIPE, text=True)
    try:
        assert tracer.stderr is not None
        line = tracer.stderr.readline()
        assert "attached" in line, line
        yield notes
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.communicate(timeout=PATIENCE)


def how_often(notes: Path) -> int:
    return len(re.findall("INJECTED", notes.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("error, outcome", [("ENETUNREACH", "connect-unreachable"), ("EACCES", "connect-unreachable")])
@pytest.mark.row("F16", "connect() fails with ENETUNREACH, EACCES", "every client ECONNRESET, the relay lives")
def test_connect_fails(lab: Lab, relay: RelayProcess, tmp_path: Path, error: str, outcome: str, seen: Seen) -> None:
    with injected(relay, tmp_path, "connect", f"error={error}") as notes:
        for _ in range(CLIENTS):
            with see_reset(lab.client, lab.server.ipv4, PORT)[0] as client:
                assert relay.record_of(client)["outcome"] == outcome
    assert how_often(notes) == CLIENTS
    check_service(lab)
    seen(f"{CLIENTS} of {CLIENTS} reset: {outcome}; then served again")


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["ECONNABORTED:when=1..3", "EMFILE:when=1..50", "ENOBUFS:when=1..5", "EPERM:when=1..3"]
)
@pytest.mark.row("F17", "accept() fails: ECONNABORTED, EMFILE 50 times, ENOBUFS, EPERM", "4 of 4 served; CPU < 10 %")
def test_accept_fails(lab: Lab, relay: RelayProcess, tmp_path: Path, what: str, seen: Seen) -> None:
    worker = relay.worker
    with injected(relay, tmp_path, "accept4", f"error={what}") as notes:
        began, before = time.monotonic(), cpu_seconds(worker)
        with EchoServer(lab, PORT), contextlib.closing(Clients(lab, PORT, CLIENTS)) as clients:
            clients.watch(PATIENCE)
            assert len(clients.served) == CLIENTS, (clients.waiting, clients.reset)
        used = (cpu_seconds(worker) - before) / (time.monotonic() - began)
    times = how_often(notes)
    assert times >= 3, "nothing was injected"
    assert used < 0.1 or times < 10, f"{used:.0%} of a processor"
    assert relay.worker == worker, "it has died of it"
    check_service(lab)
    seen(f"{CLIENTS} of {CLIENTS} served")


def cpu_seconds(pid: int) -> float:
    """User and system time so far, of all threads (schedstat would count strace's stops, too)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_service(lab: Lab) -> None:
    with EchoServer(lab, PORT), contextlib.closing(Clients(lab, PORT, CLIENTS)) as clients:
        clients.watch(PATIENCE)
        assert len(clients.served) == CLIENTS


@pytest.mark.slow
@pytest.mark.row("H30", "no resolver, strace of a connection", "no lookup on the data path")
def test_no_name_is_looked_up(lab: Lab, relay: RelayProcess, tmp_path: Path, seen: Seen) -> None:
    """Whatever opens a file or a socket while connections come: none is for names."""
    notes = tmp_path / "strace"
    command = ["strace", "-f", "-o", str(notes), "-e", "trace=openat,open,connect,socket,sendto", "-p"]
    tracer = subprocess.Popen([*command, str(relay.worker)], stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None and "attached" in tracer.stderr.readline()
    check_service(lab)
    tracer.send_signal(signal.SIGINT)
    tracer.communicate(timeout=PATIENCE)
    text = notes.read_text()
    assert text.count("connect(") >= CLIENTS, "nothing was traced"
    assert not re.search(r"resolv|nsswitch|/etc/hosts|htons\(53\)|AF_NETLINK|SOCK_DGRAM.*IPPROTO_IP\)", text), text
    seen("none")
