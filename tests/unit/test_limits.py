"""How many connections fit into the descriptors."""

import logging

import pytest

from tproxy_relay import limits


@pytest.mark.parametrize("workers", [1, 4])
def test_as_many_as_the_descriptors_of_all_workers_allow(workers: int) -> None:
    for descriptors in (1000, 20_000):
        most, room = limits.of_relay(None, descriptors, 4, workers)
        assert most == workers * room
        used = room * limits.DESCRIPTORS_EACH + limits.RESERVED_DESCRIPTORS + 4
        assert descriptors - 4 <= used <= descriptors


def test_each_listener_takes_a_descriptor_of_each_worker() -> None:
    assert limits.of_relay(None, 1000, 2, 1).room - limits.of_relay(None, 1000, 42, 1).room == 20


def test_fewer_when_fewer_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    """Any worker may hold all of them, if the others have none."""
    most, room = limits.of_relay(7, 1000, 4, 4)
    assert most == 7
    assert room == limits.of_relay(None, 1000, 4, 4).room
    assert not caplog.records


def test_more_than_one_worker_can_hold_are_held_by_several(caplog: pytest.LogCaptureFixture) -> None:
    room = limits.of_relay(None, 1000, 4, 4).room
    assert limits.of_relay(2 * room, 1000, 4, 4) == (2 * room, room)
    assert not caplog.records


def test_never_more_than_there_is_room_for(caplog: pytest.LogCaptureFixture) -> None:
    possible = limits.of_relay(None, 1000, 4, 2)
    assert limits.of_relay(5000, 1000, 4, 2) == possible
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    said = {name: vars(warning)[name] for name in ("wanted", "possible", "descriptors", "workers")}
    assert said == {"wanted": 5000, "possible": possible.most, "descriptors": 1000, "workers": 2}


@pytest.mark.parametrize("descriptors", [0, 3, 20])
def test_one_is_always_tried(descriptors: int) -> None:
    assert limits.of_relay(None, descriptors, 4, 1) == (1, 1)
