"""What one worker answers about its live connections, over the channel as the supervisor asks."""

import json
import socket
from collections.abc import Mapping
from typing import Any

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from workers import Running

from tproxy_relay import session_query
from tproxy_relay.worker import messages, sessions

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def asked(running: Running, query: Mapping[str, str] | None) -> tuple[dict[str, Any], list[tuple[Any, dict[str, Any]]]]:
    """The first line, and of each other one the key and the connection."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            running.control.send(messages.ListSessions(query).to_message(), [theirs.fileno()])
        ours.settimeout(PATIENCE)
        head, *lines = loopback.read_to_end(ours)[0].splitlines()
    rows = [line.split(b"\t", 1) for line in lines]
    return json.loads(head), [(json.loads(key), json.loads(row)) for key, row in rows]


def test_each_connection_is_told_once_in_the_order_asked_for() -> None:
    with Running() as running:
        pairs = [running.connect() for _ in range(3)]
        for count, (client, server) in zip((7, 70, 700), pairs):
            client.sendall(bytes(count))
            loopback.read_exactly(server, count)
        wait_until(lambda: sum(sum(one.moved) for one in running.worker.live) == 777 + 3, "all is counted, both ways")
        head, rows = asked(running, {"sort": "bytes", "limit": "2"})
        assert head == {"live": 3, "matching": 3, "refused": []}
        assert [(key, row["bytes_up"]) for key, row in rows] == [(701, 700), (71, 70)]
        head, rows = asked(running, {"id": running.worker.live[0].id})
        assert (head["matching"], [row["bytes_up"] for _, row in rows]) == (1, [7])
        assert asked(running, None) == ({"live": 3, "matching": 0, "refused": []}, [])


def test_what_was_refused_last_is_told_too() -> None:
    with Running(max_per_source=1) as running:
        running.connect()
        with running.dial():
            running.lines.closed()
        head, _ = asked(running, None)
        (line,) = head["refused"]
        assert (line["outcome"], line["client"].split(":")[0]) == ("over-limit", "127.0.0.1")


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ({"state": "open"}, 1),
        ({"state": "half-closed"}, 0),
        ({"client": "127.0.0.0/8"}, 1),
        ({"client": "192.0.2.0/24"}, 0),
        ({"min-age": "1000"}, 0),
        ({"min-idle": "1000"}, 0),
        ({"ending": "idle"}, 1),
        ({"ending": "drained"}, 0),
        ({"text": "no such thing"}, 0),
    ],
    ids=str,
)
def test_whom_a_query_matches(query: dict[str, str], count: int) -> None:
    with Running(idle_timeout=1000.0) as running:
        running.connect()
        wait_until(lambda: len(running.worker.live), "it is live")
        pieces = list(sessions.answer(running.worker.live, [], session_query.parse(query)))
        head, *rows = b"".join(pieces).splitlines()
        assert (json.loads(head)["matching"], len(rows)) == (count, count)
