"""The numbers of /status as Prometheus reads them, by its own library (the extra `metrics`).

Names follow https://prometheus.io/docs/practices/naming/: base units, `_total` for what only grows, and labels with few
values: no address is one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tproxy_relay.outcome import Outcome

KIND = CONTENT_TYPE_LATEST
"""The type of what `text` returns."""

Document = Mapping[str, Any]


def text(status: Document) -> bytes:
    """The metrics of this document of /status, in the text format of Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(status))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, status: Document) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        """None: what there is depends on the document."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics, one after the other; the registry calls it."""
        yield InfoMetricFamily(
            "tproxy_relay", "The version of the relay.", value={"version": str(self._status["version"])}
        )
        yield from _of_connections(self._status)
        yield from _of_the_process(self._status)


def _of_connections(status: Document) -> Iterator[Metric]:
    connections = status["connections"]
    yield _counter("connections_accepted", "Connections that were accepted.", connections["accepted"])
    closed = CounterMetricFamily(
        "tproxy_relay_connections_closed", "Connections that have ended, by how they ended.", labels=["outcome"]
    )
    for outcome in Outcome:
        closed.add_metric([outcome.value], connections["closed"].get(outcome.value, 0))
    yield closed
    yield _gauge("connections_active", "Connections that are there now: accepted less closed.", connections["active"])
    yield _gauge("connections_limit", "Connections that may be there at the same time.", connections["most"])
    moved = CounterMetricFamily(
        "tproxy_relay_relayed_bytes", "Bytes passed on: up to servers, down to clients.", labels=["direction"]
    )
    for direction in ("up", "down"):
        moved.add_metric([direction], status["bytes"][direction])
    yield moved
    yield _histogram("connect_duration_seconds", "How long connecting to a server took.", status["connect_seconds"])
    yield _histogram("connection_duration_seconds", "How long connections lasted.", status["duration_seconds"])


def _of_the_process(status: Document) -> Iterator[Metric]:
    yield _gauge("start_time_seconds", "When the relay was started, since 1970.", status["started"])
    yield _gauge("healthy", "1 if `tproxy-relay status` has no complaint.", int(status["health"] == "ok"))
    problems = GaugeMetricFamily(
        "tproxy_relay_problem", "1 for each kind of thing that is wrong now.", labels=["name", "class"]
    )
    for name, kind in sorted({(one["name"], one["class"]) for one in status["problems"]}):
        problems.add_metric([name, kind], 1)
    yield problems
    waiting = GaugeMetricFamily(
        "tproxy_relay_backlog_connections", "Connections that wait in the kernel to be accepted.", labels=["listener"]
    )
    for listener in status["listeners"]:
        waiting.add_metric([listener["name"]], listener["waiting"])
    yield waiting
    yield _counter(
        "listen_overflows",
        "Connections lost because a backlog was full, of all programs in this network namespace.",
        status["listen_overflows"],
    )
    serving = sum(worker["state"] == "serving" for worker in status["workers"])
    yield _gauge("workers", "Workers that take new connections.", serving)
    yield _counter("worker_deaths", "Workers that have died.", status["worker_deaths"])
    reloads = CounterMetricFamily("tproxy_relay_reloads", "Reloads, by what became of them.", labels=["result"])
    reloads.add_metric(["done"], status["reloads"])
    reloads.add_metric(["refused"], status["reloads_refused"])
    yield reloads
    yield _counter("log_records_dropped", "Log records that were lost.", status["log_dropped"])
    if status["ruleset"] is not None:
        active = int(status["ruleset"]["state"] == "active" and not status["ruleset"]["trouble"])
        yield _gauge("ruleset_active", "1 if the relay's own ruleset intercepts.", active)


def _counter(name: str, meaning: str, value: float) -> Metric:
    return CounterMetricFamily(f"tproxy_relay_{name}", meaning, value=value)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(f"tproxy_relay_{name}", meaning, value=value)


def _histogram(name: str, meaning: str, lengths: Document) -> Metric:
    """Prometheus wants each bucket with all that are smaller."""
    buckets, so_far = [], 0
    for bound, count in lengths["buckets"]:
        so_far += count
        buckets.append(("+Inf" if bound is None else repr(float(bound)), so_far))
    return HistogramMetricFamily(f"tproxy_relay_{name}", meaning, buckets=buckets, sum_value=lengths["sum"])
