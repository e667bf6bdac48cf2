"""The alerts and the dashboard in etc/ use numbers that there are, in expressions that Prometheus takes."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from tproxy_relay.outcome import Outcome

ETC = Path(__file__).parents[3] / "etc"
RULES = ETC / "prometheus" / "tproxy-relay.rules.yml"
DASHBOARD = json.loads((ETC / "grafana" / "tproxy-relay.json").read_text())
SOURCE = (ETC.parent / "tproxy_relay" / "admin" / "metrics.py").read_text()
GRAFANA = {"$__rate_interval": "5m", "$instance": ".*"}
"""What Grafana puts in the place of its variables."""

ALERT_TEST = """
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: 'tproxy_relay_healthy{instance="a"}'
        values: '1 0x20'
      - series: 'tproxy_relay_healthy{instance="b"}'
        values: '1x20'
      - series: 'tproxy_relay_problem{instance="a", name="self-probe", class="relay"}'
        values: '_ 1x5'
      - series: 'tproxy_relay_problem{instance="a", name="full", class="minor"}'
        values: '_ 1x5'
      - series: 'tproxy_relay_connections_closed_total{instance="a", outcome="connect-refused"}'
        values: '0+10x60'
      - series: 'tproxy_relay_connections_closed_total{instance="a", outcome="completed"}'
        values: '0+100x60'
      - series: 'tproxy_relay_connections_closed_total{instance="b", outcome="connect-refused"}'
        values: '0+1x60'
      - series: 'tproxy_relay_connections_closed_total{instance="b", outcome="completed"}'
        values: '0+100x60'
    alert_rule_test:
      - {eval_time: 1m, alertname: TproxyRelayUnhealthy}
      - {eval_time: 0m, alertname: TproxyRelayDegraded}
      - eval_time: 1m
        alertname: TproxyRelayDegraded
        exp_alerts:
          - exp_labels: {severity: critical, instance: a, name: self-probe, class: relay}
            exp_annotations:
              summary: "Connections do not come to the relay at a as they should: self-probe"
              description: "`tproxy-relay status` names who is in the way, and the command that mends it."
      - eval_time: 10m
        alertname: TproxyRelayUnhealthy
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "The relay at a complains"
              description: "`tproxy-relay status` says of what."
      - eval_time: 30m
        alertname: TproxyRelayUpstreamFailures
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "More than 5 % of connections through a do not reach their server"
              description: "`tproxy-relay status` has the last ones, and why."
"""


@pytest.fixture
def promtool(require_or_skip: Callable[[str], NoReturn]) -> str:
    return shutil.which("promtool") or require_or_skip("promtool is not installed")


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def expressions() -> Iterator[str]:
    """Of both."""
    yield from (rule["expr"] for rule in rules())
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def known() -> set[str]:
    """Names of samples, as admin/metrics.py makes them."""
    names = set()
    for kind, name in re.findall(r'(_counter|_gauge|_histogram)\(\s*"(\w+)"', SOURCE):
        for end in {"_counter": ("_total",), "_gauge": ("",), "_histogram": ("_bucket", "_sum", "_count")}[kind]:
            names.add(f"tproxy_relay_{name}{end}")
    for kind, name in re.findall(r'(Counter|Gauge)MetricFamily\(\s*"(\w+)"', SOURCE):
        names.add(name + ("_total" if kind == "Counter" else ""))
    return names


def test_they_use_what_there_is() -> None:
    assert len(known()) > 15
    for text in expressions():
        assert set(re.findall(r"\btproxy_relay_\w+", text)) <= known(), text
    outcomes = {
        word for text in expressions() for one in re.findall(r'outcome=~?"([^"]+)"', text) for word in one.split("|")
    }
    for word in outcomes:
        assert any(re.fullmatch(word, outcome.value) for outcome in Outcome), word


def test_every_number_is_on_the_dashboard_or_an_alert() -> None:
    used = {name for text in expressions() for name in re.findall(r"\btproxy_relay_\w+", text)}
    unused = {name for name in known() if not name.endswith(("_sum", "_count"))} - used
    assert unused == {"tproxy_relay_start_time_seconds", "tproxy_relay_workers", "tproxy_relay_reloads_total"}


def test_prometheus_takes_the_alerts(promtool: str, tmp_path: Path) -> None:
    subprocess.run([promtool, "check", "rules", RULES], check=True, capture_output=True)
    (tmp_path / "test.yml").write_text(ALERT_TEST.replace("RULES", str(RULES)))
    done = subprocess.run(
        [promtool, "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_dashboard(promtool: str, tmp_path: Path) -> None:
    taken = []
    for number, text in enumerate(expressions()):
        for variable, value in GRAFANA.items():
            text = text.replace(variable, value)
        assert "$" not in text
        taken.append({"record": f"r{number}", "expr": text})
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "x", "rules": taken}]}))
    done = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_is_whole() -> None:
    """As Grafana's documentation of its JSON model has it."""
    assert {"title", "panels", "templating", "time", "schemaVersion"} <= set(DASHBOARD)
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers)) and not DASHBOARD.get("id")
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert {"title", "type", "gridPos", "fieldConfig", "targets"} <= set(panel) and panel["fieldConfig"][
            "defaults"
        ]["unit"]
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and all(x < 24 for x, _ in cells), panel["title"]
        taken |= cells
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"source", "instance"}
