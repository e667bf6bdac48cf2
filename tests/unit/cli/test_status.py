"""What people read of a relay's answers."""

from typing import Any

import pytest

from tproxy_relay.cli import status
from tproxy_relay.cli.humanize import amount, lasted

LENGTHS = {"count": 10, "sum": 1.0, "p50": 0.0005, "p90": 0.025, "p99": None, "buckets": []}
STATUS: dict[str, Any] = {
    "version": "1.0",
    "pid": 7,
    "state": "running",
    "uptime_seconds": 7325.0,
    "health": "degraded",
    "complaints": ["nearly full: 91 of 100 connections"],
    "connections": {
        "active": 91,
        "accepted": 1091,
        "most": 100,
        "closed": {"denied": 3, "completed": 997},
        "seconds_since_last": 0.4,
    },
    "rates": {"accepted": 12.34, "bytes_up": 2048, "bytes_down": 0},
    "bytes": {"up": 1 << 30, "down": 5},
    "connect_seconds": LENGTHS,
    "duration_seconds": {**LENGTHS, "count": 0},
    "ruleset": {"state": "active", "backend": "nft", "plan": "x", "trouble": None},
    "listeners": [{"name": "[::]:15006", "waiting": 2, "backlog": 4096}, {"name": "x:1", "waiting": 0, "backlog": 1}],
    "listen_overflows": 4,
    "workers": [{"pid": 8, "generation": 1, "state": "leaving", "active": 91, "room": 100}],
    "worker_deaths": 1,
    "reloads": 2,
    "reloads_refused": 0,
    "log_dropped": 6,
    "silent": [9],
    "last_refused": [
        {"time": 0.0, "client": "192.0.2.1:1", "orig_dst": "127.0.0.1:80", "outcome": "denied", "error": "special"},
        {"time": 0.0, "client": "192.0.2.1:2", "outcome": "not-intercepted"},
    ],
    "last_problems": [{"time": 0.0, "level": "ERROR", "message": "worker ended", "pid": "8", "how": "signal 9"}],
}


def test_everything_that_a_status_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "clock", lambda when: "NOW")
    monkeypatch.setattr("tproxy_relay.cli.humanize.clock", lambda when: "NOW")
    assert list(status.status_lines(STATUS)) == [
        "tproxy-relay 1.0, process 7: running for 2 h 2 min, degraded",
        "  ! nearly full: 91 of 100 connections",
        "connections   91 now (at most 100), 1,091 so far; 12.3 new a second; the last one came 400 ms ago",
        "bytes         to servers 1.0 GiB (2.0 KiB/s), to clients 5 B (0 B/s)",
        "ended         completed 997, denied 3",
        "connecting    50% within 0.5 ms, 90% within 25 ms, 99% longer than all bounds",
        "ruleset       active (nft)",
        "in backlog    2 at [::]:15006; 4 lost on this host",
        "workers       process 8: 91 of 100 (leaving)",
        "since start   worker deaths 1, reloads 2, log dropped 6",
        "silent        workers that did not answer: 9",
        "last refused  NOW 192.0.2.1:1 to 127.0.0.1:80: denied: special",
        "              NOW 192.0.2.1:2 to ?: not-intercepted",
        "last problems NOW worker ended pid=8 how=signal 9",
    ]


def test_a_quiet_relay_says_little() -> None:
    quiet = {
        **STATUS,
        "complaints": [],
        "connections": {"active": 0, "accepted": 0, "most": 100, "closed": {}, "seconds_since_last": None},
        "connect_seconds": {**LENGTHS, "count": 0},
        "ruleset": None,
        "listeners": [],
        "listen_overflows": 0,
        "worker_deaths": 0,
        "reloads": 0,
        "log_dropped": 0,
        "silent": [],
        "last_refused": [],
        "last_problems": [],
    }
    lines = list(status.status_lines(quiet))
    assert len(lines) == 6
    assert lines[1].endswith("none has come yet")
    assert "rules status" in lines[3] and lines[4] == "in backlog    nobody"


SESSION: dict[str, Any] = {
    "id": "1f-6b-3",
    "client": "192.0.2.1:1",
    "orig_dst": "192.0.2.2:443",
    "destination": "192.0.2.3:8443",
    "state": "open",
    "seconds": 61.0,
    "idle_seconds": 0.25,
    "bytes_up": 100,
    "bytes_down": 5000,
    "rate_up": 1000,
    "rate_down": 24,
    "client_rtt_ms": 0.0123,
    "upstream_rtt_ms": 120.4,
    "ending": "idle",
    "ending_in_seconds": 9.75,
}


def test_a_table_of_connections() -> None:
    refused = {key: SESSION[key] for key in ("id", "client", "state", "seconds", "idle_seconds")}
    refused.update(bytes_up=0, bytes_down=0, rate_up=0, rate_down=0)
    found = {"sessions": [SESSION, refused], "matching": 7, "silent": []}
    head, one, other, last = status.session_lines(found)
    assert head.split() == " ".join(status.COLUMNS).split()
    assert one.split("  ")[-1] == "idle in 9.75 s"
    for cell in ("192.0.2.2:443 > 192.0.2.3:8443", "1 min 1 s", "250 ms", "1.0 KiB/s", "0.0123/120 ms"):
        assert cell in one
    assert "-/- ms" in other
    assert last == "2 of 7 connections"
    assert list(status.session_lines({"sessions": [], "matching": 0, "silent": [4]}))[1:] == [
        "0 connections",
        "workers that did not answer: 4",
    ]


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0 ms"), (0.0005, "0.5 ms"), (0.0234, "23 ms"), (0.9994, "999 ms"), (1, "1 s"), (59.4, "59.4 s"),
        (60, "1 min"), (3599, "59 min 59 s"), (3600, "1 h"), (86399, "23 h 59 min"), (90000, "1 d 1 h"),
    ],
)  # fmt: skip
def test_how_long(seconds: float, text: str) -> None:
    assert lasted(seconds) == text


@pytest.mark.parametrize(
    "number, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (102400, "100 KiB"), (1 << 20, "1.0 MiB"), (5 << 50, "5120 TiB")],
)
def test_how_much(number: float, text: str) -> None:
    assert amount(number) == text
