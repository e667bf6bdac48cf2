"""What goes on being wrong is one line, and one more when it is over."""

import logging
import time

import lines as lines_module
import pytest

from tproxy_relay.logs.complaint import INTERVAL, Complaint

log = logging.getLogger("tproxy_relay.test")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_is_said_once_and_once_more_when_it_is_over(clock: list[float]) -> None:
    complaint = Complaint(log)
    with lines_module.collected() as lines:
        for _ in range(100):
            complaint.say("broken", by="somebody")
            clock[0] += 2 * INTERVAL
            assert complaint
        complaint.over("whole")
        complaint.over("whole")
        assert not complaint
    assert [(one.levelname, one.getMessage()) for one in lines.records] == [("ERROR", "broken"), ("INFO", "whole")]
    assert lines_module.fields(lines.records[0])["by"] == "somebody"


def test_what_comes_and_goes_repeats_no_line_within_a_minute(clock: list[float]) -> None:
    complaint = Complaint(log, logging.WARNING)
    with lines_module.collected() as lines:
        for _ in range(60):
            complaint.say("broken")
            complaint.over("whole")
            clock[0] += 2
    assert [one.getMessage() for one in lines.records] == ["broken", "whole"] * 2


def test_what_is_wrong_in_another_way_is_another_line(clock: list[float]) -> None:
    complaint = Complaint(log)
    with lines_module.collected() as lines:
        for line in ("broken", "burnt", "broken", "burnt"):
            complaint.say(line)
            clock[0] += 1
        complaint.over("whole")
    assert [one.getMessage() for one in lines.records] == ["broken", "burnt", "whole"]


def test_that_it_is_well_is_no_news_if_nobody_has_complained() -> None:
    with lines_module.collected() as lines:
        Complaint(log).over("whole")
    assert not lines.records
