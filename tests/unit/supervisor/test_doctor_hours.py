"""When the doctor comes, by a clock of the test's own."""

import math

from tproxy_relay.supervisor.doctor_hours import FIRST_TRY, LOOK, ROUTINE, SETTLED, TRY, Hours


def visit(hours: Hours, now: float, *, sick: bool = False, new: bool = False) -> list[str]:
    """One that takes no time; what was done."""
    parts = hours.parts(now)
    hours.begun(parts, now)
    hours.done(parts, now, sick=sick, new=new)
    return parts


def started(self_probe: float = 600.0) -> tuple[Hours, float]:
    """After the first look and the first connection."""
    hours = Hours(0.0, self_probe)
    hours.changed(0.5)  # the relay itself has made rules
    assert hours.due == SETTLED and visit(hours, SETTLED) == [LOOK]
    if self_probe:
        assert hours.due == FIRST_TRY and visit(hours, FIRST_TRY) == [LOOK, TRY]
    return hours, 500.0


def test_nothing_happens() -> None:
    hours, _ = started()
    assert hours.due == FIRST_TRY + ROUTINE
    assert started(0.0)[0].due == SETTLED + ROUTINE
    assert started(60.0)[0].due == FIRST_TRY + 60.0


def test_a_change_after_a_long_time_is_looked_at_at_once() -> None:
    hours, now = started()
    hours.changed(now)
    assert hours.due == now and visit(hours, now) == [LOOK, TRY]
    hours, now = started(0.0)
    hours.changed(now)
    assert visit(hours, now) == [LOOK]


def test_without_end_changes_are_looked_at_less_and_less() -> None:
    hours, now = started()
    looks = tries = 0
    for second in range(3600):
        hours.changed(now + second)
        if now + second >= hours.due:
            parts = visit(hours, now + second)
            looks, tries = looks + 1, tries + (TRY in parts)
    assert 25 < looks < 45 and 5 < tries < 20
    hours.changed(now + 5000)
    visit(hours, now + 5000)
    hours.changed(now + 5001)
    assert hours.due == now + 5006, "there was rest, and it begins anew"


def test_who_is_sick_is_seen_again_soon_and_then_later() -> None:
    hours, now = started()
    hours.changed(now)
    visit(hours, now, sick=True, new=True)
    gaps = []
    for _ in range(20):
        due = hours.due
        gaps.append(due - now)
        now = due
        assert TRY in visit(hours, now, sick=True)
    assert gaps[0] == 5.0 and gaps[-1] == 60.0 and gaps == sorted(gaps)
    hours.changed(now + 4)
    assert hours.due == now + 4, "whatever has changed may have mended it"


def test_missing_connections_are_looked_for_at_once() -> None:
    hours, now = started()
    hours.suspected(now)
    assert visit(hours, now) == [LOOK, TRY]
    dues = []
    for second in range(1, 3600, 4):
        hours.suspected(now + second)
        if now + second >= hours.due:
            dues.append(second)
            visit(hours, now + second)
    assert 10 < len(dues) < 60, "a scanner is no reason to work without end"


def test_what_was_mended_is_tried() -> None:
    hours, now = started()
    visit(hours, now)
    hours.again(now)
    assert hours.due <= now + 3.0
    assert math.isfinite(hours.due)
