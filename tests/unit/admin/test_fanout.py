"""One question to several workers: each may answer, be silent, or hang up; and what becomes of their answers."""

import json
import os
import selectors
import socket
from collections.abc import Iterator, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tproxy_relay.admin.fanout import Question, Worker, merged
from tproxy_relay.session_query import MAX_LIMIT, Query


class Someone:
    """A worker that answers when the test says so."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.orders: list[dict[str, object]] = []
        self.sock: socket.socket | None = None

    def list_sessions(self, fd: int, query: Mapping[str, str] | None) -> None:
        self.orders.append({"order": "sessions", "query": query})
        self.sock = socket.socket(fileno=os.dup(fd))

    def abort_session(self, fd: int, number: str, account: int) -> None:
        raise AssertionError("nobody wants that here")

    def say(self, answer: bytes, *, and_hang_up: bool = True) -> None:
        assert self.sock is not None
        self.sock.sendall(answer)
        if and_hang_up:
            self.sock.close()


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


def order(worker: Worker, fd: int) -> None:
    """A question to one."""
    worker.list_sessions(fd, None)


def turn(selector: selectors.BaseSelector) -> None:
    """As the loop of the supervisor."""
    for key, _ in selector.select(0):
        key.data()


def test_answers_come_in_any_order_and_in_pieces(selector: selectors.BaseSelector) -> None:
    calls: list[str] = []
    one, other = Someone(1), Someone(2)
    question = Question(selector, lambda: calls.append("over"))
    question.ask(order, [one, other])
    assert one.orders == other.orders == [{"order": "sessions", "query": None}]
    other.say(b"an", and_hang_up=False)
    turn(selector)
    other.say(b"swer\n")
    turn(selector)
    turn(selector)
    assert (question.answers, calls) == ([b"answer\n"], [])
    one.say(b"half of")
    for _ in range(2):
        turn(selector)
    assert (question.answers, question.silent, calls) == ([b"answer\n"], [1], ["over"])
    assert not selector.get_map()


def test_it_is_over_at_once_with_nobody_to_ask(selector: selectors.BaseSelector) -> None:
    calls: list[str] = []
    Question(selector, lambda: calls.append("over")).ask(order, [])
    assert calls == ["over"]


def test_who_answers_in_the_moment_of_the_end_is_too_late(selector: selectors.BaseSelector) -> None:
    calls: list[str] = []
    one = Someone(1)
    question = Question(selector, lambda: calls.append("over"))
    question.ask(order, [one])
    one.say(b"answer\n")
    (ready,) = (key for key, _ in selector.select(0))
    question.finish()
    ready.data()
    assert (question.answers, question.silent, calls) == ([], [1], ["over"])


def answer(keys: list[int]) -> bytes:
    head = json.dumps({"live": len(keys), "matching": len(keys), "refused": keys[:1]})
    return "".join([f"{head}\n", *(f"{key}\t{key}\n" for key in keys)]).encode()


@given(st.lists(st.lists(st.integers(0, 99))), st.booleans(), st.integers(1, 9) | st.just(MAX_LIMIT))
def test_the_order_of_all_is_the_order_of_each(several: list[list[int]], reverse: bool, limit: int) -> None:
    answers = [answer(sorted(keys, reverse=not reverse)) for keys in several]
    matching, refused, rows = merged(answers, Query(reverse=reverse, limit=limit))
    everything = sorted((key for keys in several for key in keys), reverse=not reverse)
    assert [int(row) for row in rows] == everything[:limit]
    assert (matching, len(refused)) == (len(everything), sum(map(bool, several)))


@pytest.mark.parametrize("nonsense", [b"\n", b"x\n", b"[]\n", b"{}\n", answer([1]) + b"no tab\n"])
def test_what_is_no_answer(nonsense: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        merged([answer([]), nonsense], Query())
