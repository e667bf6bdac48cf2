"""Two numbers, and when they are suspicious."""

from tproxy_relay.guard.messages import Counted
from tproxy_relay.supervisor.missing import Missing


def test_connections_that_come_are_not_suspicious() -> None:
    missing = Missing()
    for number in range(1, 20):
        assert not missing.note(Counted(2 * number, 0), number, float(number)), "half of them were sent again"
    assert not missing.certain


def test_an_idle_relay_misses_nobody() -> None:
    missing = Missing()
    for number in range(100):
        assert not missing.note(Counted(7, 7), 14, float(number))


def test_what_was_taken_is_told_later_than_what_came() -> None:
    missing = Missing()
    for round in range(1, 9):
        assert not missing.note(Counted(4 * round - 4, 0), 4 * round, 10.0 * round)
        assert not missing.note(Counted(4 * round, 0), 4 * round, 10.0 * round + 4)
        assert missing.number == 0
    missing.note(Counted(32, 0), 33, 100.0)
    assert missing.note(Counted(40, 0), 33, 104.0), "and yet these are missed"


def test_a_few_that_do_not_come_are_suspicious_once() -> None:
    missing = Missing()
    missing.note(Counted(10, 10), 20, 0.0)
    assert not missing.note(Counted(12, 10), 20, 4.0), "they may be on their way"
    assert missing.note(Counted(13, 10), 20, 8.0)
    assert not missing.note(Counted(13, 10), 20, 9.0), "nothing new"
    missing.disproved()
    assert not missing.note(Counted(14, 10), 20, 12.0)


def test_many_and_none_came_is_certain() -> None:
    missing = Missing()
    missing.note(Counted(), 0, 0.0)
    missing.note(Counted(20, 0), 0, 1000.0)
    assert not missing.certain, "not for long"
    missing.note(Counted(21, 0), 0, 1012.0)
    assert missing.certain and missing.number == 21
    missing.note(Counted(22, 0), 1, 1016.0)
    assert not missing.certain, "one came"


def test_rules_that_were_loaded_anew_begin_anew() -> None:
    missing = Missing()
    missing.note(Counted(100, 0), 100, 0.0)
    assert not missing.note(Counted(2, 0), 100, 4.0)
    assert missing.number == 0
