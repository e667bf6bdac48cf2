"""What is wrong, since when, and what the log has of it."""

import lines as lines_module
import pytest
from lines import fields

from tproxy_relay.supervisor import health
from tproxy_relay.supervisor.health import MINOR, Health, Problem

ONE = Problem("marks", "nft rule x uses bits of mark-mask", "nft delete rule x")
OTHER = Problem("full", "full: 1 connections", kind=MINOR)


def test_a_problem_is_told_when_it_begins_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(health.time, "time", lambda: clock[0])
    monkeypatch.setattr(health.time, "monotonic", lambda: clock[0])
    found = Health()
    with lines_module.collected() as said:
        for problems in ([ONE], [ONE], []):
            found.put("look", problems)
            assert [one.since for one in found.problems] == [100.0] * len(problems), "since it began"
            clock[0] += 4.5
    begun, over = said.records
    assert (begun.levelname, fields(begun)) == ("WARNING", {"problem": "marks", "what": ONE.what, "do": ONE.remedy})
    assert (over.getMessage(), fields(over)["seconds"]) == ("no longer degraded", 9)


def test_a_number_that_grows_is_no_other_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(health.time, "time", lambda: clock[0])
    monkeypatch.setattr(health.time, "monotonic", lambda: clock[0])
    found = Health()
    with lines_module.collected() as said:
        for number in (12, 16, 18):
            found.put("numbers", [Problem("missing-connections", f"{number} connections", about="all")])
            clock[0] += 10
        (there,) = found.problems
        assert (there.problem.what, there.since) == ("18 connections", 100.0)
        found.put("numbers", [])
    begun, over = said.records
    assert fields(begun)["what"] == "12 connections"
    assert (fields(over)["what"], fields(over)["seconds"]) == ("18 connections", 30)


def test_each_source_has_its_own() -> None:
    found = Health()
    found.put("look", [ONE])
    found.put(health.OWN, [OTHER], logs=False)
    assert [one.problem for one in found.problems] == [OTHER, ONE], "the relay's own come first"
    assert found.serious == [ONE] and [one.problem for one in found.of("look")] == [ONE]
    found.put("look", [])
    assert [one.problem for one in found.problems] == [OTHER]


def test_in_words_and_in_json() -> None:
    found = Health()
    found.put("look", [ONE])
    assert str(ONE) == "nft rule x uses bits of mark-mask; do: nft delete rule x" and str(OTHER) == OTHER.what
    (document,) = (one.as_json() for one in found.problems)
    assert set(document) == {"name", "what", "remedy", "since", "class"} and document["class"] == "relay"


def test_how_long_it_lasted_is_not_by_the_clock_that_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(health.time, "time", lambda: clock[0])
    found = Health()
    with lines_module.collected() as said:
        found.put("look", [ONE])
        clock[0] -= 900
        found.put("look", [])
    assert fields(said.records[-1])["seconds"] == 0
