"""What goes on being wrong is one line, and one more when it is over."""

import time

import pytest

from tproxy_relay.logs.repeats import INTERVAL, Complaint, Seldom


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_is_said_once_and_once_more_when_it_is_over(clock: list[float]) -> None:
    complaint, said = Complaint(), list[bool]()
    assert not complaint and not complaint.ends()
    for _ in range(100):
        said.append(complaint.begins("broken"))
        clock[0] += 2 * INTERVAL
        assert complaint
    assert said == [True] + [False] * 99
    assert [complaint.ends(), complaint.ends()] == [True, False]
    assert not complaint


def test_what_comes_and_goes_repeats_no_line_within_a_minute(clock: list[float]) -> None:
    complaint, said = Complaint(), list[tuple[float, str]]()
    for _ in range(60):
        said += [(clock[0], "broken")] * complaint.begins("broken")
        clock[0] += 1
        said += [(clock[0], "whole")] * complaint.ends()
        clock[0] += 1
    assert said == [(0, "broken"), (1, "whole"), (60, "broken"), (61, "whole")]


def test_what_is_wrong_in_another_way_is_another_line(clock: list[float]) -> None:
    complaint = Complaint()
    assert [complaint.begins(why) for why in ("broken", "burnt", "broken", "burnt")] == [True, True, False, False]
    assert complaint.ends()
    assert complaint.begins("drowned") and not complaint.ends(), "that it is whole was just said"


def test_what_happens_again_and_again(clock: list[float]) -> None:
    seldom, said = Seldom(), list[float]()
    for _ in range(100):
        said += [clock[0]] * seldom.is_due("put back", "a rule")
        clock[0] += 2
    assert said == [0, 60, 120, 180]
    assert seldom.is_due("put back", "another rule")
    thrice = Seldom(3)
    assert [thrice.is_due("it") for _ in range(5)] == [True, True, True, False, False]
