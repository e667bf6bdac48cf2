"""What a running relay tells those who ask: its health, its numbers, its live connections.

In the supervisor, in its one thread. Numbers are on the scoreboard, and the connections themselves are the workers':
they are asked, and answer over a socket each, while everything else goes on.
"""

import contextlib
import json
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

from tproxy_relay import session_query
from tproxy_relay.admin import address, http, page
from tproxy_relay.admin.address import AdminSocket
from tproxy_relay.admin.history import History
from tproxy_relay.admin.http import HttpError, Request
from tproxy_relay.admin.server import Conversation, Server
from tproxy_relay.errors import UsageError
from tproxy_relay.net import unix_sockets
from tproxy_relay.session_query import Query
from tproxy_relay.worker import sessions

WORKER_TIMEOUT = 3.0
"""Seconds for the workers to tell of their connections."""
MAX_QUESTIONS = 4
"""To the workers, at the same time; 5,000 connections are some megabytes."""
MAX_ANSWER = 512 << 20
"""Bytes of one worker's answer: a million connections. One that says more is no worker of ours."""
BLOCK = 1 << 18
HOW_TO_GET_METRICS = (
    "prometheus-client is not installed for this Python: install python3-prometheus-client (Debian), or "
    "`pip install 'tproxy-relay[metrics]'`"
)

log = logging.getLogger(__name__)


class Worker(Protocol):
    """One that can be asked."""

    @property
    def pid(self) -> int:
        """Its process id; the first part of the ids of its connections, in hexadecimal digits."""

    def ask(self, order: str, fd: int, **what: object) -> None:
        """Have it answer on that descriptor."""


class Relay(Protocol):
    """What is looked into."""

    @property
    def askable(self) -> Sequence[Worker]:
        """The workers that may have connections."""

    @property
    def status(self) -> dict[str, object]:
        """The document of /status, but for what is asked of the workers."""

    @property
    def ready(self) -> str | None:
        """Why it takes no new connections; None if it does."""


class LookingIn:
    """Where it can be asked, and the answers. `selector` tells of its sockets, with this as their data."""

    def __init__(self, selector: selectors.BaseSelector, relay: Relay, history: History) -> None:
        self._selector = selector
        self._relay = relay
        self._history = history
        self._servers: dict[address.Where | None, Server] = {}
        self._questions: list[Question] = []
        with contextlib.suppress(OSError):  # another pid namespace has our number; what `admin` names is left
            self._serve(address.own())

    def _serve(self, admin: AdminSocket) -> None:
        self._servers[admin.where] = Server(self._selector, self, admin, self._answer)

    def also(self, admin: AdminSocket | None) -> None:
        """Answer there too, and only there beside the relay's own socket."""
        for where in [where for where in self._servers if where is not None]:
            self._servers.pop(where).close()
        if admin is not None:
            self._serve(admin)

    @property
    def where(self) -> address.Where | None:
        """Where that is."""
        return next((where for where in self._servers if where is not None), None)

    def fired(self, source: object) -> None:
        """The selector has told of this one."""
        with self._bugs_stay_here():
            if not any(question.fired(source) for question in list(self._questions)):
                any(server.fired(source) for server in list(self._servers.values()))

    @contextlib.contextmanager
    def _bugs_stay_here(self) -> Iterator[None]:
        """The relay goes on whatever happens to those who look in; the conversation ends when its time is over."""
        try:
            yield
        except Exception:
            log.exception("the admin interface met a bug")

    @property
    def due(self) -> list[float]:
        """When `keep_time` has something to do (time.monotonic())."""
        servers = (server.due for server in self._servers.values())
        return [at for at in servers if at is not None] + [question.until for question in self._questions]

    def keep_time(self) -> None:
        """End what has taken too long."""
        now = time.monotonic()
        for question in [one for one in self._questions if now >= one.until]:
            with self._bugs_stay_here():
                question.finish()
        for server in self._servers.values():
            with self._bugs_stay_here():
                server.keep_time(now)

    def close(self) -> None:
        """Answer nobody any more."""
        for question in list(self._questions):
            with self._bugs_stay_here():
                question.finish()
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    # --- questions

    def _answer(self, request: Request, to: Conversation) -> None:
        if request.path.startswith("/sessions/") and request.method == "DELETE":
            self._abort(request, to)
            return
        if request.method not in ("GET", "HEAD"):
            raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "this can only be looked at", Allow="GET, HEAD")
        answers = {
            "/": lambda _, to: to.answer(self._page()),
            "/status": self._tell_status,
            "/sessions": self._tell_sessions,
            "/metrics": self._tell_metrics,
            "/history": lambda _, to: to.answer(http.document(self._history.columns())),
            "/healthz": lambda _, to: to.answer(http.Response(HTTPStatus.OK, http.TEXT, b"ok\n")),
            "/readyz": self._tell_ready,
        }
        answer: Callable[[Request, Conversation], None] | None = answers.get(request.path)
        if answer is None:
            raise HttpError(HTTPStatus.NOT_FOUND, f"nothing is here; there are {', '.join(answers)}")
        if request.query and request.path != "/sessions":
            raise HttpError(HTTPStatus.BAD_REQUEST, f"{request.path} takes no query")
        answer(request, to)

    def _page(self) -> http.Response:
        try:
            return page.response()
        except OSError:  # it was updated, or descriptors have run out
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the page cannot be read now") from None

    def _tell_ready(self, _: Request, to: Conversation) -> None:
        why = self._relay.ready
        if why is None:
            to.answer(http.Response(HTTPStatus.OK, http.TEXT, b"ready\n"))
        else:
            to.answer(http.problem(HTTPStatus.SERVICE_UNAVAILABLE, why))

    def _tell_status(self, _: Request, to: Conversation) -> None:
        def told(answers: list[bytes], silent: list[int]) -> None:
            _, refused, _ = sessions.merged(answers, Query())
            refused.sort(key=lambda one: float(one["time"]), reverse=True)  # type: ignore[index]
            found = self._relay.status
            to.answer(http.document({**found, "last_refused": refused[: sessions.MAX_REFUSED], "silent": silent}))

        self._ask("sessions", self._relay.askable, to, told, query=None)

    def _tell_metrics(self, _: Request, to: Conversation) -> None:
        try:
            from tproxy_relay.admin import metrics
        except ImportError:
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, HOW_TO_GET_METRICS) from None
        to.answer(http.Response(HTTPStatus.OK, metrics.KIND, metrics.text(self._relay.status)))

    def _tell_sessions(self, request: Request, to: Conversation) -> None:
        try:
            query = session_query.parse(request.query)
        except UsageError as error:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(error)) from None

        def told(answers: list[bytes], silent: list[int]) -> None:
            matching, _, rows = sessions.merged(answers, query)
            head = json.dumps({"matching": matching, "silent": silent}, separators=(",", ":")).encode()
            body = b'%s,"sessions":[%s]}\n' % (head[:-1], b",\n".join(rows))
            to.answer(http.Response(HTTPStatus.OK, http.JSON, body))

        self._ask("sessions", self._relay.askable, to, told, query=session_query.written(query))

    def _abort(self, request: Request, to: Conversation) -> None:
        if not to.permitted:
            raise HttpError(HTTPStatus.FORBIDDEN, "only root and the account of this relay may, over a unix socket")
        try:
            number = session_query.parse({"id": request.path.removeprefix("/sessions/")}).id or ""
        except UsageError as error:
            raise HttpError(HTTPStatus.NOT_FOUND, str(error)) from None

        def told(answers: list[bytes], silent: list[int]) -> None:
            if any(json.loads(answer)["aborted"] for answer in answers):
                to.answer(http.document({"aborted": number}))
            else:
                to.answer(http.problem(HTTPStatus.NOT_FOUND, f"there is no connection {number} any more"))

        pid = int(number.partition("-")[0], 16)
        account = unix_sockets.peer(to.sock).uid
        workers = [one for one in self._relay.askable if one.pid == pid]
        self._ask("abort", workers, to, told, id=number, account=account)

    def _ask(self, order: str, workers: Sequence[Worker], to: Conversation, told: "Told", **what: object) -> None:
        if len(self._questions) >= MAX_QUESTIONS:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "too many ask at once", **{"Retry-After": "1"})
        question = Question(self._selector, self, lambda: self._is_over(question, to, told))
        self._questions.append(question)
        question.ask(order, workers, what)

    def _is_over(self, question: "Question", to: Conversation, told: "Told") -> None:
        self._questions.remove(question)
        try:
            told(question.answers, question.silent)
        except (ValueError, KeyError, TypeError, RecursionError):
            log.error("a worker talks nonsense about its connections")
            to.answer(http.problem(HTTPStatus.INTERNAL_SERVER_ERROR, "a worker talks nonsense"))


Told = Callable[[list[bytes], list[int]], None]
"""Gets the answers, and the process ids of workers that gave none."""


class _Asked(NamedTuple):
    """One worker."""

    pid: int
    answer: bytearray


class Question:
    """To some workers; the answers come in whatever order."""

    def __init__(self, selector: selectors.BaseSelector, owner: object, over: Callable[[], None]) -> None:
        """`over` is called once, when all have answered, or when it is `finish`ed."""
        self.until = time.monotonic() + WORKER_TIMEOUT
        self.answers: list[bytes] = []
        self.silent: list[int] = []
        """Process ids of workers that gave none, or not all of it."""
        self._selector = selector
        self._owner = owner
        self._over = over
        self._waiting: dict[socket.socket, _Asked] = {}

    def ask(self, order: str, workers: Iterable[Worker], what: dict[str, Any]) -> None:
        """All of them."""
        for worker in workers:
            try:
                ours, theirs = socket.socketpair()
            except OSError:  # no descriptor is left
                self.silent.append(worker.pid)
                continue
            with theirs:
                worker.ask(order, theirs.fileno(), **what)
            ours.setblocking(False)
            self._waiting[ours] = _Asked(worker.pid, bytearray())
            self._selector.register(ours, selectors.EVENT_READ, self._owner)
        if not self._waiting:
            self.finish()

    def fired(self, source: object) -> bool:
        """The selector has told of this one. False if it is none of this question's."""
        asked = self._waiting.get(source) if isinstance(source, socket.socket) else None
        if asked is None or not isinstance(source, socket.socket):
            return False
        try:
            data = source.recv(BLOCK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        asked.answer.extend(data)
        if not data or len(asked.answer) > MAX_ANSWER:
            self._has_answered(source, complete=not data and asked.answer.endswith(b"\n"))
        return True

    def _has_answered(self, sock: socket.socket, *, complete: bool) -> None:
        asked = self._waiting.pop(sock)
        self._selector.unregister(sock)
        sock.close()
        if complete:
            self.answers.append(bytes(asked.answer))
        else:
            self.silent.append(asked.pid)
        if not self._waiting:
            self.finish()

    def finish(self) -> None:
        """With what there is."""
        for sock, asked in self._waiting.items():
            self._selector.unregister(sock)
            sock.close()
            self.silent.append(asked.pid)
        self._waiting.clear()
        self._over()
