"""The live connections of one worker for whoever asks: chosen, put in order and written as JSON.

In a thread of its own, and in small pieces: after each it lets the relaying go on. Only connections that are asked for
are looked at closely.
"""

import contextlib
import heapq
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from tproxy_relay import session_query
from tproxy_relay.logs.repeats import Seldom
from tproxy_relay.relay import snapshot
from tproxy_relay.relay.connection import Connection
from tproxy_relay.relay.registry import Registry
from tproxy_relay.session_query import TEXTS, Query

SEND_TIMEOUT = 5.0
"""Seconds for the supervisor to take the next piece."""
PIECE, LARGE_PIECE = 32, 512
"""Connections that are written, or looked at from far, before others get their turn: about a millisecond."""

T = TypeVar("T")

_seldom = Seldom()
log = logging.getLogger(__name__)


def send(registry: Registry[Connection], query: Query | None, to: socket.socket) -> None:
    """Write the `answer` to a socket, in a thread, and close it in any case."""

    def run() -> None:
        with to, contextlib.suppress(OSError):  # nobody wants it any more
            to.settimeout(SEND_TIMEOUT)
            for piece in answer(registry.live(), list(registry.refused), query):
                to.sendall(piece)

    try:
        threading.Thread(target=run, name="sessions", daemon=True).start()
    except RuntimeError as error:
        if _seldom.is_due("no thread"):  # somebody may ask every second
            log.warning("the live connections cannot be shown", extra={"why": str(error)})
        to.close()


def answer(live: Sequence[Connection], refused: Sequence[object], query: Query | None) -> Iterator[bytes]:
    """One line with what there is, then one for each connection that matches, in the order of the query, as `merged`
    takes them; without a query only the first line. In pieces, some of them empty, between which others get their
    turn."""
    if query is None:
        yield _head(live, 0, refused)
        return
    now, key_of = time.monotonic(), _KEYS[query.sort]
    found: list[tuple[Any, int, Connection]] = []
    for start, some in _pieces(live, LARGE_PIECE):
        chosen = [one for one in some if matches(one, query, now)] if query.chooses else some
        found += [(key_of(one, now), number, one) for number, one in enumerate(chosen, start)]
        yield b""  # others get their turn
    yield _head(live, len(found), refused)
    largest = query.sort not in TEXTS
    first = (heapq.nlargest if largest != query.reverse else heapq.nsmallest)(query.limit, found)
    for _, rows in _pieces(first, PIECE):
        lines = []
        for key, _, one in rows:
            with contextlib.suppress(OSError):  # it has just ended
                lines.append(f"{json.dumps(key)}\t{json.dumps(snapshot.session(one), separators=(',', ':'))}\n")
        yield "".join(lines).encode()


def _head(live: Sequence[Connection], matching: int, refused: Sequence[object]) -> bytes:
    head = {"live": len(live), "matching": matching, "refused": list(refused)}
    return json.dumps(head, separators=(",", ":")).encode() + b"\n"


def matches(one: Connection, query: Query, now: float) -> bool:
    """True if the connection is one of those that were asked for, at `now` (time.monotonic())."""
    if query.id is not None and one.id != query.id:
        return False
    if query.text is not None and not any(query.text in str(part) for part in (one.id, one.client, one.orig_dst)):
        return False
    if query.client is not None and not _within(one.client.host, query.client):
        return False
    asked = one.orig_dst
    if query.destination is not None and (asked is None or not _within(asked.host, query.destination)):
        return False
    if query.port is not None and (asked is None or asked.port != query.port):
        return False
    if query.state is not None and snapshot.state(one) != query.state:
        return False
    if query.ending is not None and snapshot.ending(one, now)[0] != query.ending:
        return False
    return (
        now - one.born_at >= query.min_age
        and now - snapshot.rests_since(one) >= query.min_idle
        and one.traffic.up_rate + one.traffic.down_rate >= query.min_rate
    )


def _within(host: str, network: session_query.AnyNetwork) -> bool:
    return ipaddress.ip_address(host) in network


_KEYS: dict[str, Callable[[Connection, float], float | str]] = {
    "age": lambda one, now: now - one.born_at,
    "idle": lambda one, now: now - snapshot.rests_since(one),
    "rate": lambda one, now: one.traffic.up_rate + one.traffic.down_rate,
    "bytes": lambda one, now: sum(one.moved),
    "client": lambda one, now: str(one.client),
    "destination": lambda one, now: str(one.orig_dst or ""),
}
"""What each order goes by."""


def _pieces(things: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Each with the number of its first one."""
    for start in range(0, len(things), size):
        yield start, things[start : start + size]
