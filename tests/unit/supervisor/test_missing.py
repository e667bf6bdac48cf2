"""Two numbers, and when they are suspicious."""

import pytest

from tproxy_relay.guard.messages import Counted
from tproxy_relay.supervisor.missing import Missing


def test_connections_that_come_are_not_suspicious() -> None:
    missing = Missing(lambda: None)
    for number in range(1, 20):
        assert not missing.note(Counted(2 * number, 0), number, float(number)), "half of them were sent again"
    assert not missing.certain


def test_an_idle_relay_misses_nobody() -> None:
    missing = Missing(lambda: None)
    for number in range(100):
        assert not missing.note(Counted(7, 7), 14, float(number))


def test_what_was_taken_is_told_later_than_what_came() -> None:
    missing = Missing(lambda: None)
    for round in range(1, 9):
        assert not missing.note(Counted(4 * round - 4, 0), 4 * round, 10.0 * round)
        assert not missing.note(Counted(4 * round, 0), 4 * round, 10.0 * round + 4)
        assert missing.number == 0
    missing.note(Counted(32, 0), 33, 100.0)
    assert missing.note(Counted(40, 0), 33, 104.0), "and yet these are missed"


def test_a_few_that_do_not_come_are_suspicious_once() -> None:
    missing = Missing(lambda: None)
    missing.note(Counted(10, 10), 20, 0.0)
    assert not missing.note(Counted(12, 10), 20, 4.0), "they may be on their way"
    assert missing.note(Counted(13, 10), 20, 8.0)
    assert not missing.note(Counted(13, 10), 20, 9.0), "nothing new"
    missing.tried(1, 10.0, changed=False)
    assert not missing.note(Counted(14, 10), 20, 12.0)


def test_many_and_none_came_is_certain() -> None:
    missing = Missing(lambda: None)
    missing.note(Counted(), 0, 0.0)
    missing.note(Counted(20, 0), 0, 1000.0)
    assert not missing.certain, "not for long"
    missing.note(Counted(21, 0), 0, 1012.0)
    assert missing.certain and missing.number == 21
    missing.note(Counted(22, 0), 1, 1016.0)
    assert not missing.certain, "one came"


def test_rules_that_were_loaded_anew_begin_anew() -> None:
    missing = Missing(lambda: None)
    missing.note(Counted(100, 0), 100, 0.0)
    assert not missing.note(Counted(2, 0), 100, 4.0)
    assert missing.number == 0


def lost(traces: list[int], number: int = 12) -> Missing:
    """So many within eleven seconds; what is in the list is what the kernel has counted by now."""
    missing = Missing(lambda: traces[-1])
    for second in range(number):
        missing.note(Counted(1 + second, 0), 0, float(second))
    return missing


def test_what_leaves_no_trace_is_missing_whatever_was_tried() -> None:
    traces = [100]
    missing = lost(traces)
    assert missing.certain and missing.traced is False
    missing.tried(2, 12.0, changed=False)
    missing.note(Counted(15, 0), 2, 13.0)
    assert missing.certain and missing.number == 13, "without our own ones"
    traces.append(105)
    assert missing.traced is False, "some scanner among many"
    missing.note(Counted(16, 0), 3, 14.0)
    assert not missing.certain, "one came"


@pytest.mark.parametrize("traces, changed, now", [(107, False, 12.0), (100, True, 12.0), (100, False, 1000.0)])
def test_what_was_tried_disproves_the_rest(traces: int, changed: bool, now: float) -> None:
    counted = [100]
    missing = lost(counted)
    counted.append(traces)
    missing.tried(2, now, changed=changed)
    assert missing.number == 0 and not missing.certain


def test_nothing_is_known_without_numbers_of_the_kernel() -> None:
    missing = Missing(lambda: None)
    for second in range(12):
        missing.note(Counted(1 + second, 0), 0, float(second))
    assert missing.certain and missing.traced is None
    missing.tried(2, 12.0, changed=False)
    assert missing.number == 0


def test_what_was_taken_for_another_relay_is_not_missed() -> None:
    missing = Missing(lambda: None)
    assert not missing.note(None, 0, 0.0), "its guard has not said yet"
    assert not missing.note(Counted(1_000_001, 0), 1, 5.0)
    assert missing.number == 0
    assert not missing.note(Counted(1_000_002, 0), 2, 30.0) and not missing.certain
    assert missing.note(Counted(1_000_012, 0), 2, 60.0), "and yet these are missed"
