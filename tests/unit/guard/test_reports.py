"""What the guard has told, for another thread."""

from tproxy_relay.guard.messages import Counted, HostChanged
from tproxy_relay.guard.reports import Reports


def test_changes_are_counted_and_the_last_count_is_kept() -> None:
    reports = Reports(None)
    assert (reports.changes, reports.counted) == (0, None)
    for event in (HostChanged(), Counted(1, 2), HostChanged(), Counted(3, 2)):
        reports.take(event)
    assert (reports.changes, reports.counted) == (2, Counted(3, 2))
