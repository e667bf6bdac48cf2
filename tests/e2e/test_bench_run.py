"""The bench still runs: the relay, a small peer and no relay; and what reads its result."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
from company import Company
from stage import Stage
from work import requests

from tproxy_relay.lab import Lab, LabError

BENCH = Path(__file__).parents[1] / "bench"

CELLS = ("bulk1-down", "rr32", "conn1", "mixed")

pytestmark = pytest.mark.slow


def bench(program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(BENCH / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def result_of(file: Path, cells: Sequence[str], peers: str, *options: str) -> dict[str, Any]:
    wanted = ["--rounds", "1", "--seconds", "0.3", "--only", ",".join(cells), "--peers", peers, "--require"]
    done = bench("run.py", *wanted, *options, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    run: dict[str, Any] = json.loads(file.read_text())
    assert run["failures"] == run["warnings"] == []
    assert "| requests, 32 connections" in done.stdout
    return run


def test_a_round(lab: Lab, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> None:
    """`lab` says if there can be one at all."""
    file = tmp_path / "run.json"
    run = result_of(file, CELLS, "relay,c,direct")
    assert set(run["rounds"]) == set(CELLS)
    assert set(run["versions"]) == {"relay", "c", "direct"} and run["machine"]["kernel"]
    assert run["settings"]["net.ipv4.tcp_congestion_control"]
    for (one,) in run["rounds"].values():
        assert set(one) == {"relay", "c", "direct"}
        for found in one.values():
            assert all(0 <= found[part] <= 1 for part in ("idle", "strangers", "stolen"))
            assert found.get("rate", 1e9) > 100 and found.get("throughput", 1e9) > 1e7
            assert 0 <= found.get("p50", 0) <= found.get("p99", 0) <= 1.001 * found.get("max", 0)
    (requests,) = run["rounds"]["rr32"]
    assert requests["relay"]["cpu_per_item"] > 0 == requests["direct"]["cpu_per_item"]
    same = bench("compare.py", "--baseline", str(file), str(file))
    assert (same.returncode, "0 better, 0 worse" in same.stdout) == (0, True), same.stdout + same.stderr


def test_what_goes_past_a_relay_is_no_record(lab: Lab) -> None:
    """Ours opens the way when it dies, by default; others' traffic then ends at the rules of the stage."""
    with Stage() as stage, Company(stage, ["relay", "c"]) as company:
        relay, c = company.peers
        requests(4)(relay, 0.1)
        with relay.witnessed():
            requests(4)(relay, 0.1)
        for peer in (relay, c):
            for pid in reversed(peer.pids()):
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(LabError, match=f"has seen connections from {stage.lab.client.ipv4}"):
            with relay.witnessed():
                requests(4)(relay, 0.1)
        with pytest.raises(TimeoutError):
            stage.lab.client.connect(stage.lab.server.ipv4, c.port, timeout=1)
        with pytest.raises(LabError, match="nobody came"):
            with c.witnessed():
                pass


def test_other_ways_to_run_it(lab: Lab, tmp_path: Path) -> None:
    """A variant is proven by what the server sees; afterwards the relay is as before."""
    cells = ("rr32-source", "rr32-w1", "rr32", "rr32-v6")
    run = result_of(tmp_path / "run.json", cells, "relay", "--option", "max-per-source = 1000")
    assert all(run["rounds"][cell][0]["relay"]["rate"] > 100 for cell in cells)


def test_without_a_peer_that_was_required(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = bench("run.py", "--peers", "relay,c", "--require")
    assert done.returncode == 1 and "gcc" in done.stderr


def test_without_what_is_not_there() -> None:
    done = bench("run.py", "--only", "rr33")
    assert done.returncode == 1 and "no such cell: rr33" in done.stderr and "rr32-16k" in done.stderr
    done = bench("run.py", "--peers", "relay,nginx")
    assert done.returncode == 2 and "no such peer: nginx" in done.stderr
