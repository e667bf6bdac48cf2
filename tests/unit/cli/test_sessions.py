"""What people read of the live connections of a relay."""

from typing import Any

from tproxy_relay.cli import sessions

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
    head, one, other, last = sessions.session_lines(found)
    assert head.split() == " ".join(sessions.COLUMNS).split()
    assert one.split("  ")[-1] == "idle in 9.75 s"
    for cell in ("192.0.2.2:443 > 192.0.2.3:8443", "1 min 1 s", "250 ms", "1.0 KiB/s", "0.0123/120 ms"):
        assert cell in one
    assert "-/- ms" in other
    assert last == "2 of 7 connections"
    assert list(sessions.session_lines({"sessions": [], "matching": 0, "silent": [4]}))[1:] == [
        "0 connections",
        "workers that did not answer: 4",
    ]
