"""What is asked of workers, when they answer, when they do not, and when they talk nonsense."""

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest
from deadlines import PATIENCE, wait_until

from tproxy_relay.admin import address, fanout
from tproxy_relay.admin.api import Api
from tproxy_relay.admin.client import Client
from tproxy_relay.admin.history import History
from tproxy_relay.errors import RelayError, SystemRefusedError


class Someone:
    """A worker: what it writes to those who ask, before it closes; None: it neither writes nor closes."""

    def __init__(self, pid: int, *answers: bytes | None) -> None:
        self.pid = pid
        self.answers = list(answers)
        self.orders: list[dict[str, object]] = []
        self.kept: list[int] = []

    def list_sessions(self, fd: int, query: Mapping[str, str] | None) -> None:
        self.answer({"order": "sessions", "query": query}, fd)

    def abort_session(self, fd: int, number: str, account: int) -> None:
        self.answer({"order": "abort", "id": number, "account": account}, fd)

    def answer(self, order: dict[str, object], fd: int) -> None:
        self.orders.append(order)
        answer = self.answers[0]
        if answer is None:
            self.kept.append(os.dup(fd))
        else:
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.sendall(answer)


class Relay:
    """With these workers."""

    why_not_ready: str | None = None

    def __init__(self) -> None:
        self.askable: Sequence[Someone] = []
        self.bug: Exception | None = None

    @property
    def status(self) -> dict[str, object]:
        if self.bug is not None:
            raise self.bug
        return {"state": "running"}


class Desk:
    """Asked from another thread."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.relay = Relay()
        self.history = History()
        self.api = Api(self.selector, self.relay, self.history)
        self._stop, self._wake = socket.socketpair()
        self.selector.register(self._stop, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="desk")
        self._thread.start()
        self.client = Client(os.getpid())

    def _run(self) -> None:
        while True:
            due = self.api.deadline
            for key, _ in self.selector.select(None if due is None else max(0.0, due - time.monotonic())):
                if key.fileobj is self._stop:
                    return
                key.data()
            self.api.tick(time.monotonic())

    def close(self) -> None:
        self._wake.send(b".")
        self._thread.join(PATIENCE)
        self.api.close()
        self.selector.close()
        self._stop.close()
        self._wake.close()
        for worker in self.relay.askable:
            for fd in worker.kept:
                os.close(fd)


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk()
    yield made
    made.close()


def answer(*rows: tuple[float, str], refused: Sequence[object] = ()) -> bytes:
    head = json.dumps({"live": len(rows), "matching": len(rows), "refused": refused})
    return "".join([f"{head}\n", *(f'{key}\t{{"id":"{name}"}}\n' for key, name in rows)]).encode()


def names(document: dict[str, object]) -> list[str]:
    sessions = document["sessions"]
    assert isinstance(sessions, list)
    return [one["id"] for one in sessions]


def test_what_several_workers_have_is_put_in_one_order(desk: Desk) -> None:
    desk.relay.askable = [
        Someone(1, answer((9, "a"), (5, "b"))),
        Someone(2, answer((7, "c"), (1, "d"))),
        Someone(3, answer()),
    ]
    found = desk.client.get("/sessions", {"port": "80"})
    assert names(found) == ["a", "c", "b", "d"] and (found["matching"], found["silent"]) == (4, [])
    assert desk.relay.askable[0].orders == [{"order": "sessions", "query": {"port": "80"}}]
    assert names(desk.client.get("/sessions", {"limit": "2"})) == ["a", "c"]
    desk.relay.askable = [Someone(1, answer((1, "b"), (3, "a"))), Someone(2, answer((2, "c")))]
    assert names(desk.client.get("/sessions", {"reverse": "yes"})) == ["b", "c", "a"]
    desk.relay.askable = []
    assert names(desk.client.get("/sessions")) == []


def test_who_does_not_answer_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "WORKER_TIMEOUT", 0.3)
    cut_short = answer((1, "a"))[:-1]
    desk.relay.askable = [Someone(1, answer((1, "a"))), Someone(2, None), Someone(3, b""), Someone(4, cut_short)]
    found = desk.client.get("/sessions")
    assert (names(found), sorted(found["silent"])) == (["a"], [2, 3, 4])


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\n", b"x\n", b"[]\n", b"{}\n", b'{"matching":"x","refused":[]}\n', b'{"matching":1,"refused":0}\n',
        b"[" * 99999 + b"\n", answer() + b"no tab\n", answer() + b"{\t{}\n", b"\xff\n",
    ],
)  # fmt: skip
def test_a_worker_that_talks_nonsense_hurts_nobody(desk: Desk, nonsense: bytes) -> None:
    desk.relay.askable = [Someone(1, nonsense)]
    with pytest.raises(SystemRefusedError, match="a worker talks nonsense"):
        desk.client.get("/sessions")
    desk.relay.askable = [Someone(1, answer())]
    assert names(desk.client.get("/sessions")) == []


def test_a_bug_stays_here(desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    desk.relay.bug = ZeroDivisionError("a bug")
    monkeypatch.setattr("tproxy_relay.admin.server.ANSWER_TIMEOUT", 0.2)
    with pytest.raises(RelayError, match="does not answer"):
        desk.client.get("/status")
    assert "the admin interface met a bug" in caplog.text and "ZeroDivisionError" in caplog.text
    desk.relay.bug = None
    assert desk.client.get("/status")["state"] == "running"


def test_the_last_refusals_of_all(desk: Desk) -> None:
    desk.relay.askable = [
        Someone(1, answer(refused=[{"time": 1.0}, {"time": 5.0}])),
        Someone(2, answer(refused=[{"time": 3.0}])),
    ]
    assert [one["time"] for one in desk.client.get("/status")["last_refused"]] == [5.0, 3.0, 1.0]
    assert desk.relay.askable[0].orders == [{"order": "sessions", "query": None}]


def test_only_some_ask_at_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.relay.askable = [Someone(1, None)]
    with contextlib.ExitStack() as stack:
        for _ in range(fanout.MAX_QUESTIONS):
            sock = stack.enter_context(address.dial(os.getpid(), PATIENCE))
            sock.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n")
        wait_until(lambda: desk.api.debug_state()["questions"] == fanout.MAX_QUESTIONS, "they wait")
        with pytest.raises(SystemRefusedError, match="too many ask at once"):
            desk.client.get("/sessions")
        assert desk.client.get("/history")["at"] == [], "what is known here is told"


def test_an_abort_goes_to_the_worker_that_has_it(desk: Desk) -> None:
    one, other = Someone(0x1F, b'{"aborted": true}\n'), Someone(2, b'{"aborted": true}\n')
    desk.relay.askable = [one, other]
    desk.client.abort("1f-1-1")
    assert (one.orders, other.orders) == ([{"order": "abort", "id": "1f-1-1", "account": os.getuid()}], [])
    for number, why in (("3-1-1", "there is no connection 3-1-1 any more"), ("x", "'x' is not the id of a connection")):
        with pytest.raises(SystemRefusedError, match=why):
            desk.client.abort(number)
    one.answers = [b'{"aborted": false}\n']
    with pytest.raises(SystemRefusedError, match="there is no connection 1f-1-1 any more"):
        desk.client.abort("1f-1-1")


@pytest.mark.parametrize(
    "request_line, status",
    [
        ("GET /nothing", b"404 Not Found"),
        ("GET /sessions/1-1-1", b"404 Not Found"),
        ("DELETE /status", b"405 Method Not Allowed"),
        ("POST /sessions/1-1-1", b"405 Method Not Allowed"),
        ("GET /status?x=1", b"400 Bad Request"),
        ("DELETE /sessions/no-id", b"404 Not Found"),
        ("HEAD /healthz", b"200 OK"),
        ("GET /readyz", b"200 OK"),
    ],
)
def test_what_there_is_to_ask(desk: Desk, request_line: str, status: bytes) -> None:
    with address.dial(os.getpid(), PATIENCE) as sock:
        sock.sendall(f"{request_line} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 " + status + b"\r\n")


def test_what_is_not_there_names_what_is(desk: Desk) -> None:
    why = "there are /, /status, /sessions, /metrics, /history, /healthz, /readyz$"
    with pytest.raises(SystemRefusedError, match=why):
        desk.client.get("/nothing")
