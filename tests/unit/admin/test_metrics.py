"""What Prometheus reads: its own parser and its own linter."""

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client.parser import text_string_to_metric_families

from tproxy_relay.admin import metrics
from tproxy_relay.outcome import Outcome

LENGTHS = {"count": 7, "sum": 2.5, "buckets": [[0.001, 4], [0.5, 2], [None, 1]]}
STATUS: dict[str, Any] = {
    "version": "1.0",
    "started": 1e9,
    "health": "ok",
    "problems": [{"name": "full", "class": "minor"}, *[{"name": "self-probe", "class": "relay"}] * 2],
    "connections": {"accepted": 100, "active": 7, "closed": {"completed": 90, "denied": 3}, "most": 1000},
    "bytes": {"up": 5, "down": 70},
    "connect_seconds": LENGTHS,
    "duration_seconds": LENGTHS,
    "listeners": [{"name": "[::]:15006", "waiting": 2, "backlog": 4096}],
    "listen_overflows": 4,
    "workers": [{"state": "serving"}, {"state": "leaving"}],
    "worker_deaths": 1,
    "reloads": 2,
    "reloads_refused": 3,
    "log_dropped": 6,
    "ruleset": {"state": "active", "trouble": None},
}


def samples(status: dict[str, Any]) -> dict[str, float]:
    """By name and labels, as Prometheus' own parser sees them."""
    found = {}
    for family in text_string_to_metric_families(metrics.text(status).decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            found[sample.name.removeprefix("tproxy_relay_") + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def test_all_numbers() -> None:
    found = samples(STATUS)
    closed = {name: value for name, value in found.items() if name.startswith("connections_closed_total")}
    assert set(closed) == {f"connections_closed_total{{outcome={outcome.value}}}" for outcome in Outcome}
    assert found["connections_accepted_total"] == found["connections_active"] + sum(closed.values()) == 100
    wanted = {
        "info{version=1.0}": 1,
        "connections_limit": 1000,
        "problem{class=minor,name=full}": 1,
        "problem{class=relay,name=self-probe}": 1,
        "relayed_bytes_total{direction=up}": 5,
        "relayed_bytes_total{direction=down}": 70,
        "connect_duration_seconds_bucket{le=0.001}": 4,
        "connect_duration_seconds_bucket{le=0.5}": 6,
        "connect_duration_seconds_bucket{le=+Inf}": 7,
        "connect_duration_seconds_count": 7,
        "connection_duration_seconds_sum": 2.5,
        "start_time_seconds": 1e9,
        "healthy": 1,
        "backlog_connections{listener=[::]:15006}": 2,
        "listen_overflows_total": 4,
        "workers": 1,
        "worker_deaths_total": 1,
        "reloads_total{result=done}": 2,
        "reloads_total{result=refused}": 3,
        "log_records_dropped_total": 6,
        "ruleset_active": 1,
    }
    assert {name: found[name] for name in wanted} == wanted


def test_what_is_wrong_is_a_number() -> None:
    status = copy.deepcopy(STATUS)
    status["health"], status["ruleset"]["trouble"] = "degraded", "no nft"
    found = samples(status)
    assert found["healthy"] == found["ruleset_active"] == 0
    status["ruleset"] = None
    assert "ruleset_active" not in samples(status)


def test_promtool_has_no_complaint(require_or_skip: Callable[[str], NoReturn]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        require_or_skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "metrics"], input=metrics.text(STATUS), capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_without_the_library_everything_else_works(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError\n")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tproxy_relay.admin.api import Api\n"
        "from tproxy_relay.admin.http import HttpError\n"
        "try: Api.get_metrics(None, None, None)\n"
        "except HttpError as error: print(error.response.status.value, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("501 prometheus-client is not installed")
