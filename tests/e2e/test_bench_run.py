"""The bench still runs: the relay and no relay, in two cells."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tproxy_relay.lab import Lab

BENCH = Path(__file__).parents[1] / "bench"

pytestmark = pytest.mark.slow


def test_a_round_of_two_cells(lab: Lab, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> None:
    """`lab` says if there can be one at all."""
    result = tmp_path / "run.json"
    options = ["--rounds", "1", "--seconds", "0.3", "--only", "rr32,conn1", "--peers", "relay,c,direct", "--require"]
    command = [sys.executable, str(BENCH / "run.py"), *options, "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads(result.read_text())
    assert run["failures"] == run["warnings"] == []
    for cell in ("rr32", "conn1"):
        (one,) = run["rounds"][cell]
        assert set(one) == {"relay", "c", "direct"}
        for found in one.values():
            assert found["rate"] > 100 and 0 < found["p50"] <= found["p99"] <= found["max"]
        assert one["relay"]["cpu_per_item"] > 0 == one["direct"]["cpu_per_item"]
    assert "| requests, 32 connections | rate |" in done.stdout
