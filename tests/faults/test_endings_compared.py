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


def test_the_table_of_the_manual_is_what_is_seen(table: endings.Table) -> None:
    with endings.KEPT.open(newline="", encoding="utf-8") as file:
        kept = list(csv.reader(file))
    assert without_counts(kept) == without_counts(endings.rows(table)), "python tests/faults/endings.py --keep"
    assert [row[:3] for row in kept] == [row[:3] for row in endings.rows(table)]


def without_counts(rows: list[list[str]]) -> list[list[str]]:
    """How much HAProxy loses is another number each time."""
    return [[re.sub("[0-9,]+ bytes", "bytes", cell) for cell in row] for row in rows]
