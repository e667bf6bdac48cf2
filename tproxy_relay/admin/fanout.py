"""One question to all workers: each answers over a socket of its own, and the answers are merged.

Everything else goes on meanwhile. A worker that does not answer is named, and the others' answers count.
"""

import heapq
import json
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from itertools import islice
from typing import Protocol

from tproxy_relay.admin import http
from tproxy_relay.admin.http import HttpError
from tproxy_relay.admin.server import Conversation, bugs_stay_here
from tproxy_relay.session_query import TEXTS, Query

WORKER_TIMEOUT = 3.0
"""Seconds for the workers to tell of their connections."""
MAX_QUESTIONS = 4
"""To the workers, at the same time; 5,000 connections are some megabytes."""
MAX_ANSWER = 512 << 20
"""Bytes of one worker's answer: a million connections. One that says more is no worker of ours."""
BLOCK = 1 << 18

log = logging.getLogger(__name__)


class Worker(Protocol):
    """A worker, as far as it can be asked."""

    @property
    def pid(self) -> int:
        """Its process id; the first part of the ids of its connections, in hexadecimal digits."""

    def list_sessions(self, fd: int, query: Mapping[str, str] | None) -> None:
        """Have it answer on that descriptor with its live connections (None: with their number only), and with what it
        has refused."""

    def abort_session(self, fd: int, number: str, account: int) -> None:
        """Have it reset the connection with that id for this account (uid), and answer on that descriptor."""


Order = Callable[[Worker, int], None]
"""Asks a worker to answer on a descriptor, which stays the caller's."""
Answered = Callable[[list[bytes], list[int]], None]
"""Gets the answers, and the process ids of workers that gave none. ValueError, KeyError, TypeError or RecursionError:
they make no sense."""


class Fanout:
    """The questions that wait for their answers."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._questions: list[Question] = []

    def debug_state(self) -> dict[str, int]:
        """For tests: `questions` that wait for answers."""
        return {"questions": len(self._questions)}

    def ask(self, order: Order, workers: Sequence[Worker], to: Conversation, then: Answered) -> None:
        """Give this order to these workers; `then` answers the conversation. Raises HttpError if too many wait."""
        if len(self._questions) >= MAX_QUESTIONS:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "too many ask at once", **{"Retry-After": "1"})
        question = Question(self._selector, lambda: self._finish(question, to, then))
        self._questions.append(question)
        question.ask(order, workers)

    def _finish(self, question: "Question", to: Conversation, then: Answered) -> None:
        self._questions.remove(question)
        try:
            then(question.answers, question.silent)
        except (ValueError, KeyError, TypeError, RecursionError):
            log.error("a worker talks nonsense about its connections")
            to.answer(http.problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a worker talks nonsense"))

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: nothing waits."""
        return min((question.deadline for question in self._questions), default=None)

    def tick(self, now: float) -> None:
        """Finish the questions that have waited too long; `now` is time.monotonic()."""
        for question in [one for one in self._questions if now >= one.deadline]:
            question.finish()

    def close(self) -> None:
        """Finish all of them, with the answers that there are."""
        for question in list(self._questions):
            question.finish()


class Question:
    """To some workers; the answers come in whatever order."""

    def __init__(self, selector: selectors.BaseSelector, then: Callable[[], None]) -> None:
        """`then` is called once, when all have answered, or when it is `finish`ed."""
        self.deadline = time.monotonic() + WORKER_TIMEOUT
        self.answers: list[bytes] = []
        self.silent: list[int] = []
        """Process ids of workers that gave none, or not all of it."""
        self._selector = selector
        self._then = then
        self._waiting: list[_Asked] = []

    def ask(self, order: Order, workers: Iterable[Worker]) -> None:
        """Give the order to each of them, with a socket for its answer."""
        for worker in workers:
            try:
                ours, theirs = socket.socketpair()
            except OSError:  # no descriptor is left
                self.silent.append(worker.pid)
                continue
            with theirs:
                order(worker, theirs.fileno())
            ours.setblocking(False)
            asked = _Asked(self, worker.pid, ours)
            self._waiting.append(asked)
            self._selector.register(ours, selectors.EVENT_READ, asked.on_readable)
        if not self._waiting:
            self.finish()

    def has_answered(self, asked: "_Asked", answer: bytes | None) -> None:
        """One of them has; None: its answer is not complete, and never will be."""
        self._waiting.remove(asked)
        self._hang_up(asked)
        if answer is None:
            self.silent.append(asked.pid)
        else:
            self.answers.append(answer)
        if not self._waiting:
            self.finish()

    def _hang_up(self, asked: "_Asked") -> None:
        self._selector.unregister(asked.sock)
        asked.sock.close()

    @bugs_stay_here()
    def finish(self) -> None:
        """Wait for no more answers; those that are missing are of silent workers."""
        for asked in self._waiting:
            self._hang_up(asked)
            self.silent.append(asked.pid)
        self._waiting.clear()
        self._then()


class _Asked:
    """One worker, and what it has answered so far."""

    def __init__(self, question: Question, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self._question = question
        self._answer = bytearray()

    @bugs_stay_here()
    def on_readable(self) -> None:
        if self.sock.fileno() < 0:
            return  # the question was finished in the same turn of the loop
        try:
            data = self.sock.recv(BLOCK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._answer.extend(data)
        if not data or len(self._answer) > MAX_ANSWER:
            complete = not data and self._answer.endswith(b"\n")
            self._question.has_answered(self, bytes(self._answer) if complete else None)


def merged(answers: Iterable[bytes], query: Query) -> tuple[int, list[object], list[bytes]]:
    """What several workers have answered: how many match, what was refused, and the connections, each as JSON. Raises
    ValueError, KeyError or TypeError for what is no answer."""
    matching, refused, columns = 0, [], []
    for answer in answers:
        head, *lines = answer.splitlines()
        found = json.loads(head)
        matching += int(found["matching"])
        refused += found["refused"]
        pairs = (line.split(b"\t", 1) for line in lines)
        columns.append([(json.loads(key), text) for key, text in pairs])
    largest = query.sort not in TEXTS
    rows = heapq.merge(*columns, key=lambda row: row[0], reverse=largest != query.reverse)
    return matching, refused, [text for _, text in islice(rows, query.limit)]
