"""What a running relay answers those who ask: its health, its numbers, its live connections.

In the supervisor, in its one thread. Numbers are on the scoreboard, and the connections themselves are the workers':
they are asked (`fanout`), while everything else goes on.
"""

import contextlib
import json
import selectors
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from http import HTTPStatus
from typing import NamedTuple, Protocol

from tproxy_relay import session_query
from tproxy_relay.admin import address, http, page
from tproxy_relay.admin.address import AdminSocket
from tproxy_relay.admin.fanout import Fanout, Worker, merged
from tproxy_relay.admin.history import History
from tproxy_relay.admin.http import HttpError, Request
from tproxy_relay.admin.server import Conversation, Server
from tproxy_relay.errors import UsageError
from tproxy_relay.net import unix_sockets
from tproxy_relay.session_query import Query

HOW_TO_GET_METRICS = (
    "prometheus-client is not installed for this Python: install python3-prometheus-client (Debian), or "
    "`pip install 'tproxy-relay[metrics]'`"
)


class Relay(Protocol):
    """The relay that answers, as far as the endpoints need it."""

    @property
    def askable(self) -> Sequence[Worker]:
        """The workers that may have connections."""

    @property
    def status(self) -> dict[str, object]:
        """The document of /status, but for what is asked of the workers."""

    @property
    def why_not_ready(self) -> str | None:
        """Why it takes no new connections; None if it does."""


class Api:
    """The sockets where the relay can be asked, and the answers. The data of what it registers is the method to
    call."""

    def __init__(self, selector: selectors.BaseSelector, relay: Relay, history: History) -> None:
        self._selector = selector
        self._relay = relay
        self._history = history
        self._fanout = Fanout(selector)
        self._servers: dict[address.Where | None, Server] = {}
        with contextlib.suppress(OSError):  # another pid namespace has our number; what `admin` names is left
            self._serve(address.own())

    def _serve(self, admin: AdminSocket) -> None:
        self._servers[admin.where] = Server(self._selector, admin, self._answer)

    def open_public(self, admin: AdminSocket) -> None:
        """Answer there too, and only there beside the relay's own socket."""
        self.close_public()
        self._serve(admin)

    def close_public(self) -> None:
        """Answer at the relay's own socket only."""
        for where in [where for where in self._servers if where is not None]:
            self._servers.pop(where).close()

    @property
    def public(self) -> address.Where | None:
        """Where it answers beside the relay's own socket; None: nowhere."""
        return next((where for where in self._servers if where is not None), None)

    def debug_state(self) -> dict[str, int]:
        """For tests: `questions` that wait for answers of the workers."""
        return self._fanout.debug_state()

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: not before something comes."""
        deadlines = [self._fanout.deadline, *(server.deadline for server in self._servers.values())]
        return min((at for at in deadlines if at is not None), default=None)

    def tick(self, now: float) -> None:
        """End what has taken too long; `now` is time.monotonic()."""
        self._fanout.tick(now)
        for server in self._servers.values():
            server.tick(now)

    def close(self) -> None:
        """Answer nobody any more, and close all sockets."""
        self._fanout.close()
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def _answer(self, request: Request, to: Conversation) -> None:
        endpoint = _endpoint(request)
        if request.query and not endpoint.takes_query:
            raise HttpError(HTTPStatus.BAD_REQUEST, f"{request.path} takes no query")
        endpoint.handler(self, request, to)

    # --- the endpoints

    def get_page(self, _: Request, to: Conversation) -> None:
        """Answer with the page for browsers."""
        try:
            to.answer(page.response())
        except OSError:  # it was updated, or descriptors have run out
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the page cannot be read now") from None

    def get_status(self, _: Request, to: Conversation) -> None:
        """Answer with the health and all numbers, as JSON."""

        def answered(answers: list[bytes], silent: list[int]) -> None:
            _, refused, _ = merged(answers, Query())
            refused.sort(key=lambda one: float(one["time"]), reverse=True)  # type: ignore[index]
            found = self._relay.status
            last = refused[: session_query.MAX_REFUSED]
            to.answer(http.document({**found, "last_refused": last, "silent": silent}))

        self._fanout.ask(lambda worker, fd: worker.list_sessions(fd, None), self._relay.askable, to, answered)

    def get_sessions(self, request: Request, to: Conversation) -> None:
        """Answer with the live connections that the query chooses, as JSON."""
        try:
            query = session_query.parse(request.query)
        except UsageError as error:
            raise HttpError(HTTPStatus.BAD_REQUEST, str(error)) from None

        def answered(answers: list[bytes], silent: list[int]) -> None:
            matching, _, rows = merged(answers, query)
            head = json.dumps({"matching": matching, "silent": silent}, separators=(",", ":")).encode()
            body = b'%s,"sessions":[%s]}\n' % (head[:-1], b",\n".join(rows))
            to.answer(http.Response(HTTPStatus.OK, http.JSON, body))

        wanted = session_query.written(query)
        self._fanout.ask(lambda worker, fd: worker.list_sessions(fd, wanted), self._relay.askable, to, answered)

    def get_metrics(self, _: Request, to: Conversation) -> None:
        """Answer with the numbers as Prometheus reads them. Raises HttpError without its library."""
        try:
            from tproxy_relay.admin import metrics
        except ImportError:
            raise HttpError(HTTPStatus.NOT_IMPLEMENTED, HOW_TO_GET_METRICS) from None
        to.answer(http.Response(HTTPStatus.OK, metrics.KIND, metrics.text(self._relay.status)))

    def get_history(self, _: Request, to: Conversation) -> None:
        """Answer with the samples of the last minutes, as JSON."""
        to.answer(http.document(self._history.columns()))

    def get_healthz(self, _: Request, to: Conversation) -> None:
        """Answer 200, for as long as the process lives."""
        to.answer(http.Response(HTTPStatus.OK, http.TEXT, b"ok\n"))

    def get_readyz(self, _: Request, to: Conversation) -> None:
        """Answer 200 if the relay takes new connections, 503 and the reason if not."""
        why = self._relay.why_not_ready
        if why is None:
            to.answer(http.Response(HTTPStatus.OK, http.TEXT, b"ready\n"))
        else:
            to.answer(http.problem(HTTPStatus.SERVICE_UNAVAILABLE, why))

    def delete_session(self, request: Request, to: Conversation) -> None:
        """Abort the connection whose id the path ends with."""
        if not to.permitted:
            raise HttpError(HTTPStatus.FORBIDDEN, "only root and the account of this relay may, over a unix socket")
        try:
            number = session_query.parse({"id": request.path.removeprefix("/sessions/")}).id or ""
        except UsageError as error:
            raise HttpError(HTTPStatus.NOT_FOUND, str(error)) from None

        def answered(answers: list[bytes], silent: list[int]) -> None:
            if any(json.loads(answer)["aborted"] for answer in answers):
                to.answer(http.document({"aborted": number}))
            else:
                to.answer(http.problem(HTTPStatus.NOT_FOUND, f"there is no connection {number} any more"))

        pid = int(number.partition("-")[0], 16)
        account = unix_sockets.peer(to.sock).uid
        workers = [one for one in self._relay.askable if one.pid == pid]
        self._fanout.ask(lambda worker, fd: worker.abort_session(fd, number, account), workers, to, answered)


class Endpoint(NamedTuple):
    """A method and a path, and what answers it."""

    method: str
    path: str
    """As fnmatch(3) matches it."""
    handler: Callable[[Api, Request, Conversation], None]
    """Answers now or later. Raises HttpError."""
    takes_query: bool = False


ENDPOINTS = (
    Endpoint("GET", "/", Api.get_page),
    Endpoint("GET", "/status", Api.get_status),
    Endpoint("GET", "/sessions", Api.get_sessions, takes_query=True),
    Endpoint("GET", "/metrics", Api.get_metrics),
    Endpoint("GET", "/history", Api.get_history),
    Endpoint("GET", "/healthz", Api.get_healthz),
    Endpoint("GET", "/readyz", Api.get_readyz),
    Endpoint("DELETE", "/sessions/*", Api.delete_session, takes_query=True),
)


def _endpoint(request: Request) -> Endpoint:
    """The one that answers this request. Raises HttpError."""
    method = "GET" if request.method == "HEAD" else request.method
    for endpoint in ENDPOINTS:
        if endpoint.method == method and fnmatchcase(request.path, endpoint.path):
            return endpoint
    if method != "GET":
        raise HttpError(HTTPStatus.METHOD_NOT_ALLOWED, "this can only be looked at", Allow="GET, HEAD")
    paths = ", ".join(one.path for one in ENDPOINTS if one.method == "GET")
    raise HttpError(HTTPStatus.NOT_FOUND, f"nothing is here; there are {paths}")
