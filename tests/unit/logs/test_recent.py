"""The last warnings and errors of a process."""

import json
import logging
from collections.abc import Iterator

import pytest

from tproxy_relay.logs.recent import MAX_KEPT, Problems

log = logging.getLogger("tproxy_relay.test")


@pytest.fixture
def problems() -> Iterator[Problems]:
    made = Problems()
    log.addHandler(made)
    yield made
    log.removeHandler(made)


def test_warnings_and_errors_are_kept_with_their_fields(problems: Problems) -> None:
    log.info("all is well")
    log.warning("the disk is %s", "slow", extra={"disk": "/dev/sda", "seconds": 1.5})
    log.error("gone", extra={"error": OSError("no")})
    warning, error = problems.last
    assert warning.pop("time") <= error.pop("time")  # type: ignore[operator]
    assert warning == {"level": "WARNING", "message": "the disk is slow", "disk": "/dev/sda", "seconds": "1.5"}
    assert error == {"level": "ERROR", "message": "gone", "error": "no"}
    json.dumps(problems.last)


def test_they_are_counted_by_what_does_not_change(problems: Problems) -> None:
    for disk in ("a", "b"):
        log.warning("the disk is %s", disk)
    log.error(OSError("not a text"))
    assert problems.counts == {"the disk is %s": 2, "ERROR": 1}


def test_the_oldest_make_room_and_stay_counted(problems: Problems) -> None:
    for number in range(MAX_KEPT + 5):
        log.warning("again", extra={"number": number})
    assert [line["number"] for line in problems.last] == [str(number) for number in range(5, MAX_KEPT + 5)]
    assert problems.counts["again"] == MAX_KEPT + 5
