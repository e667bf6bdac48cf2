"""What people read of the status of a relay."""

from typing import Any

import pytest

from tproxy_relay.cli import status

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
