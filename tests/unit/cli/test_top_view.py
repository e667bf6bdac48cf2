"""The screen of top: what fits, and in which order."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxy_relay import session_query
from tproxy_relay.cli import top_view
from tproxy_relay.cli.top_view import COLUMNS, View, fitting, lines, room_for_sessions
from tproxy_relay.session_query import SORTS

STATUS: dict[str, Any] = {
    "version": "1.0",
    "pid": 7,
    "state": "running",
    "uptime_seconds": 61.0,
    "health": "ok",
    "complaints": [],
    "connections": {"active": 3, "accepted": 1234, "most": 9000, "seconds_since_last": 2.0},
    "rates": {"accepted": 1.5, "bytes_up": 1024, "bytes_down": 0},
    "bytes": {"up": 2048, "down": 5},
    "last_refused": [],
}


def session(number: int, **more: object) -> dict[str, Any]:
    return {
        "id": f"1f-6b-{number}",
        "client": f"192.0.2.{number}:1234",
        "orig_dst": "[2001:db8::1]:443",
        "state": "open",
        "seconds": 61.0,
        "idle_seconds": 0.5,
        "bytes_up": 1,
        "bytes_down": 2048,
        "rate_up": 0,
        "rate_down": 1024,
        "client_rtt_ms": 0.5,
        "upstream_rtt_ms": 20.25,
        **more,
    }


def screen(view: View, rows: int = 24, columns: int = 80) -> list[str]:
    return [line.text for line in lines(view, rows, columns)]


@pytest.fixture
def view() -> View:
    return View(status=STATUS, sessions=[session(number) for number in range(1, 4)], matching=3)


def test_a_usual_terminal(view: View) -> None:
    shown = screen(view)
    assert len(shown) == 24 and max(map(len, shown)) < 80
    assert shown[0] == "tproxy-relay 1.0, process 7, running for 1 min 1 s: ok"
    assert shown[1] == "3 connections of at most 9,000; 1,234 so far, 1.5/s, the last 2 s ago"
    assert shown[2] == "to servers 1.0 KiB/s, 2.0 KiB so far; to clients 0 B/s, 5 B so far"
    assert shown[3] == "nothing was refused"
    assert shown[5].split() == ["client", "asked", "for", "rate", "age", "state"]
    assert shown[6].split() == ["192.0.2.1:1234", "[2001:db8::1]:443", "1.0", "KiB/s", "1", "min", "1", "s", "open"]
    assert shown[9] == "" and shown[23].startswith("3 of 3 by rate | q leave")


def test_a_wide_terminal_has_all_columns(view: View) -> None:
    shown = screen(view, 50, 200)
    assert len(shown) == 50
    assert shown[5].split()[-1] == "id" and "1f-6b-1" in shown[6] and "0.5/20.2" in shown[6]


@given(st.integers(1, 400))
def test_columns_fit(width: int) -> None:
    chosen = fitting(width)
    assert sum(columns + top_view.GAP for _, columns in chosen) - top_view.GAP <= max(0, width) or not chosen
    assert [column for column, _ in chosen] == list(COLUMNS[: len(chosen)])
    assert all(column.width <= columns <= column.most for column, columns in chosen)


@given(st.integers(1, 60), st.integers(1, 250), st.integers(0, 100))
def test_nothing_is_outside_of_the_screen(rows: int, columns: int, count: int) -> None:
    view = View(status=STATUS, sessions=[session(number) for number in range(count)], matching=count)
    for view.help in (False, True):
        shown = screen(view, rows, columns)
        assert len(shown) <= rows and all(len(line) < columns for line in shown)


def test_a_small_terminal_is_told_so(view: View) -> None:
    assert screen(view, 9, 80)[0].startswith("this needs 60 columns and 10 rows")


def test_what_is_wrong_comes_first(view: View) -> None:
    refused = {"time": 0.0, "client": "192.0.2.9:1", "orig_dst": "127.0.0.1:1", "outcome": "denied"}
    view.status = {**STATUS, "last_refused": [refused]}
    assert screen(view)[3].startswith("refused: ") and "192.0.2.9:1 to 127.0.0.1:1: denied" in screen(view)[3]
    view.status = {**STATUS, "complaints": ["full", "a worker stalls"], "last_refused": [refused]}
    assert lines(view, 24, 80)[3] == ("! full; a worker stalls", "bad")


def test_a_long_or_evil_name_is_cut(view: View) -> None:
    view.sessions = [session(1, client="x" * 90), session(2, client="a\x1b[31m\nb")]
    shown = screen(view)
    assert "x" * 20 + "~" in shown[6] and "x" * 48 not in shown[6]
    assert shown[7].startswith("a?[31m?b")


def test_the_last_line(view: View) -> None:
    view.show, view.sort, view.reverse, view.paused = {"port": "443"}, "age", True, True
    assert screen(view)[-1].startswith("3 of 3 by age reversed | only port=443 | STANDS STILL | ")
    view.note = "aborted 1f-6b-1"
    assert lines(view, 24, 80)[-1] == ("aborted 1f-6b-1", "bad")
    view.trouble = "the relay is gone"
    assert lines(view, 24, 80)[-1] == ("the relay is gone", "bad")
    view.question = "really? "
    assert screen(view)[-1] == "really? "


def test_before_the_first_answer() -> None:
    assert screen(View()) == ["asking the relay ..."]
    assert screen(View(trouble="the relay is gone")) == ["the relay is gone"]


def test_one_is_chosen(view: View) -> None:
    for rows, chosen in ((1, 1), (1, 2), (5, 3), (1, 3), (-1, 2), (-9, 1)):
        view.move(rows)
        assert view.chosen == f"1f-6b-{chosen}"
        assert [line.style for line in lines(view, 24, 80)[6:9]] == ["bold" if n == chosen else "" for n in (1, 2, 3)]
    view.chosen = "gone"
    view.move(-1)
    assert view.chosen == "1f-6b-1"
    view.sessions = []
    view.move(1)


def test_what_it_asks_for(view: View) -> None:
    assert view.query(5) == {"sort": "rate", "limit": "5"}
    view.show, view.reverse = {"port": "80"}, True
    seen = []
    for _ in SORTS:
        session_query.parse(view.query(room_for_sessions(24)))
        seen.append(view.sort)
        view.next_sort()
    assert sorted(seen) == sorted(SORTS) and view.sort == "rate"
