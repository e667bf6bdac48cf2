"""Descriptors or threads run out: surplus clients wait or are reset; nobody is forgotten, nothing spins."""

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import Clients, EchoServer
from relay_fixtures import intercepting_relay
from rows import Seen

from tproxy_relay.lab import Lab, RelayProcess

PORT = 8000
CLIENTS = 300
QUIET = 2.0
"""Seconds over which the relay's use of the processor is measured."""


relay = intercepting_relay((PORT,))


def cpu_seconds(pid: int) -> float:
    """User and system time so far (proc(5), stat fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def check_full_and_back(lab: Lab, relay: RelayProcess, fewest_served: int) -> None:
    """300 clients come while only some can be had; then those leave, and the rest gets its turn."""
    with EchoServer(lab, PORT) as server, contextlib.closing(Clients(lab, PORT, CLIENTS)) as clients:
        clients.watch(10, until_served=fewest_served)
        full = relay.wait_for_line(lambda line: line["message"] == "not accepting")
        clients.watch(0.5)  # whoever is still on the way
        served_first = len(clients.served)
        assert fewest_served <= served_first < CLIENTS, full

        cpu, began = cpu_seconds(relay.worker), time.monotonic()
        clients.watch(QUIET)
        busy = (cpu_seconds(relay.worker) - cpu) / (time.monotonic() - began)
        assert busy < 0.1, f"it spins while it is full: {busy:.0%} of a processor"

        for _ in range(CLIENTS):
            if not clients.waiting:
                break
            before = len(clients.served)
            clients.close_served()
            clients.watch(10, until_served=before + 1)
        assert not clients.waiting, "accepted, or left in the backlog, and silent"
        assert not clients.ended, "a clean EOF without service"
        assert len(clients.served) + len(clients.reset) == CLIENTS
        assert server.asked == len(clients.served), "somebody was served twice, or for nothing"
        assert full["reason"]


def check_full_service(lab: Lab) -> None:
    with EchoServer(lab, PORT), contextlib.closing(Clients(lab, PORT, 70)) as clients:
        clients.watch(10)
        assert len(clients.served) == 70


@pytest.mark.row("H12", "ulimit -n 200, 300 clients", "as many as fit are served, then the others; CPU < 10 %")
def test_more_clients_than_the_descriptor_limit_allows(lab: Lab, seen: Seen) -> None:
    """ulimit -n 200: the relay knows how many it can hold, and the others wait in the backlog."""
    lab.intercept((PORT,))
    with lab.relay_process(wrapper=("prlimit", "--nofile=200:200")) as relay:
        check_full_and_back(lab, relay, fewest_served=75)
        assert [line["reason"] for line in relay.lines() if line["message"] == "not accepting"][0] == "max-connections"
        assert {record["outcome"] for record in relay.records()} == {"completed"}, "waiting was enough"
        check_full_service(lab)
        relay.stop()
    lab.stop_intercepting()
    seen("all served; CPU < 10 %")


@pytest.mark.row("H12", "the limit falls under a running worker", "nobody forgotten; CPU < 10 %; recovers")
def test_descriptors_run_out_all_the_same(lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    """The limit falls under a running worker, which counted on more: accept and socket fail with EMFILE."""
    worker = relay.worker
    in_use = len(os.listdir(f"/proc/{worker}/fd"))
    _, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (in_use + 150, hard))
    check_full_and_back(lab, relay, fewest_served=10)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (hard, hard))
    assert relay.worker == worker, "it has died of it"
    check_full_service(lab)
    edges = [line for line in relay.lines() if line["message"] in ("not accepting", "accepting again")]
    assert len(edges) < CLIENTS, "a line for each try"
    seen("nobody forgotten; recovers")


@pytest.mark.row("H13", "no more threads, 300 clients", "nobody sees EOF or is served twice; recovers")
def test_no_more_threads(lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    worker = relay.worker
    with at_most_threads(worker, threads(worker) + 150):
        check_full_and_back(lab, relay, fewest_served=60)
    check_full_service(lab)
    assert relay.worker == worker, "it has died of it"
    assert "no more threads" in {line.get("reason") for line in relay.lines()}
    seen("none; recovers")


@contextlib.contextmanager
def at_most_threads(pid: int, count: int) -> Iterator[None]:
    """Root is limited by a pids cgroup (v1 or v2), others by RLIMIT_NPROC, which counts the whole account."""
    if os.geteuid() == 0:
        with in_cgroup(pid, count):
            yield
        return
    mine = sum(threads_of_account())
    limits = resource.prlimit(pid, resource.RLIMIT_NPROC)
    resource.prlimit(pid, resource.RLIMIT_NPROC, (mine - threads(pid) + count, limits[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_NPROC, limits)


def threads_of_account() -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.geteuid():
                yield len(list((folder / "task").iterdir()))


@contextlib.contextmanager
def in_cgroup(pid: int, count: int) -> Iterator[None]:
    root = Path("/sys/fs/cgroup/pids")
    if not root.is_dir():
        root = Path("/sys/fs/cgroup")
    group = root / f"tproxy-relay-test-{os.getpid()}"
    group.mkdir()
    home = root / "cgroup.procs"
    try:
        (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text(str(count))
        yield
        (group / "pids.max").write_text("max")
        home.write_text(str(pid))
    finally:
        with contextlib.suppress(OSError):
            home.write_text(str(pid))
        group.rmdir()
