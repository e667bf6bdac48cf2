"""Every ending, directly, through the relay and through HAProxy: ours is as without a relay, and the manual says so."""

import csv
import re
from collections.abc import Callable
from typing import NoReturn

import endings
import haproxy
import pytest
from rows import Seen

from tproxy_relay.lab import Lab

pytestmark = pytest.mark.slow

HANDSHAKE_FIRST = "the server refuses"
"""The one that a relay cannot hide: it accepts before it connects."""
HOW_TO_MEND = "python tests/faults/endings.py --keep"
TRIES = 3
"""Of HAProxy: a reset meets it now and then in a moment in which it makes something else of it."""


@pytest.fixture(scope="module")
def table(lab: Lab, require_or_skip: Callable[[str], NoReturn]) -> endings.Table:
    if haproxy.program() is None:
        require_or_skip("haproxy is not installed")
    return endings.table(lab)


@pytest.mark.row("F1", "server resets in mid-transfer", "100,000 bytes, then ECONNRESET")
@pytest.mark.row("F2", "the same, slow reader", "100,000 bytes, then ECONNRESET")
@pytest.mark.row("F3", "client resets", "server: 50,000 bytes, then ECONNRESET")
@pytest.mark.row("F4", "half-close, and an answer after it", "300,000 bytes")
@pytest.mark.row("F7", "server closes with the request unread", "all that it sent, then ECONNRESET")
@pytest.mark.row("F8", "the server's process is killed", "as without a relay")
@pytest.mark.row("H1", "kill -9 of the relay in mid-transfer", "both ends ECONNRESET, never EOF")
def test_ours_are_those_of_a_direct_connection(table: endings.Table, seen: Seen) -> None:
    different = {case: seen for case, seen in table.items() if seen["tproxy-relay"] != seen["direct"]}
    assert set(different) == {HANDSHAKE_FIRST, "the relay is killed in mid-transfer"}
    assert different[HANDSHAKE_FIRST]["tproxy-relay"] == "client: connected, then ECONNRESET"
    assert different["the relay is killed in mid-transfer"]["tproxy-relay"] == "client: ECONNRESET; server: ECONNRESET"
    for number, case in (
        ("F1", "server sends and resets"),
        ("F2", "server sends and resets, slow client"),
        ("F3", "client sends and resets"),
        ("F4", "client half-closes, server answers"),
        ("F7", "server closes with the request unread"),
        ("F8", "the server's process is killed"),
        ("H1", "the relay is killed in mid-transfer"),
    ):
        seen(table[case]["tproxy-relay"], number)


def test_the_table_of_the_manual_is_what_is_seen(lab: Lab, table: endings.Table) -> None:
    with endings.KEPT.open(newline="", encoding="utf-8") as file:
        kept = list(csv.reader(file))
    rows = endings.rows(table)
    assert [row[:3] for row in kept] == [row[:3] for row in rows], HOW_TO_MEND
    haproxys = {row[0]: without_counts(row[3]) for row in kept}
    unlike = {row[0] for row in rows if without_counts(row[3]) != haproxys[row[0]]}
    for _ in range(TRIES):
        if not unlike:
            break
        found = endings.on_the_way(lab, "HAProxy")
        unlike = {case for case in unlike if case not in found or without_counts(found[case]) != haproxys[case]}
    assert not unlike, HOW_TO_MEND


def without_counts(cell: str) -> str:
    """How much HAProxy loses is another number each time."""
    return re.sub("[0-9,]+ bytes", "bytes", cell)
