"""Conversations with those who ask, all of them in the one thread of the supervisor, which has other things to do.

Nobody can keep it: a request has to be there within seconds and is small, an answer has to be taken, and more than some
at a time wait in the kernel's backlog.
"""

import contextlib
import logging
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus

from tproxy_relay.admin import http
from tproxy_relay.admin.address import AdminSocket
from tproxy_relay.admin.http import HttpError, Request, Response

MAX_CONVERSATIONS = 32
"""Conversations at each socket at the same time."""
REQUEST_TIMEOUT = 2.0
"""Seconds for a request to be there, from the first moment."""
ANSWER_TIMEOUT = 10.0
"""Seconds for an answer to be made and taken."""
GOODBYE_TIMEOUT = 0.5
"""Seconds in which the other end may still say something after it has its answer: if we closed at once, the kernel
would answer that with a reset, and the answer might be lost (RFC 9112, 9.6)."""
MAX_GOODBYE = 65536
"""Bytes of that."""
FULL_PAUSE = 0.5
"""Seconds without new conversations when there is no descriptor for one."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def bugs_stay_here() -> Iterator[None]:
    """Around whatever the loop of the supervisor calls: the relay goes on whatever happens to those who ask. The
    conversation ends when its time is over."""
    try:
        yield
    except Exception:
        log.exception("the admin interface met a bug")


class Conversation:
    """One connection of somebody who asks: a request, its answer, and the end."""

    def __init__(self, server: "Server", sock: socket.socket) -> None:
        self.sock = sock
        self.admin = server.admin
        self.until = time.monotonic() + REQUEST_TIMEOUT
        self._server = server
        self._head = b""
        self._with_body = True
        self._answer: memoryview | None = None
        self._goodbye = -1

    @property
    def permitted(self) -> bool:
        """If this one may change something."""
        return self.admin.permits(self.sock)

    @bugs_stay_here()
    def on_ready(self) -> None:
        """It can be read, or written to. Nothing happens if it was closed in the same turn of the loop."""
        if self.sock.fileno() < 0:
            return
        try:
            if self._goodbye >= 0:
                self._linger()
            elif self._answer is not None:
                self._write()
            else:
                self._read()
        except BlockingIOError:
            pass
        except OSError:
            self.close()

    def _read(self) -> None:
        data = self.sock.recv(http.MAX_HEAD + 1 - len(self._head))
        if not data:
            self.close()
            return
        self._head += data
        head, end, _ = self._head.partition(http.END)
        if end:
            self._ask(head + end)
        elif len(self._head) > http.MAX_HEAD:
            self.answer(
                http.problem(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"more than {http.MAX_HEAD} bytes of request")
            )

    def _ask(self, head: bytes) -> None:
        self._server.selector.unregister(self.sock)
        self.until = time.monotonic() + ANSWER_TIMEOUT
        try:
            request = http.parse(head)
            self._with_body = request.method != "HEAD"
            if self.admin.is_tcp and not http.is_of_this_host(request.host):
                raise HttpError(HTTPStatus.FORBIDDEN, "this name is not one of this host's loopback interface")
            self._server.ask(request, self)
        except HttpError as error:
            self.answer(error.response)

    def answer(self, response: Response) -> None:
        """Send the response, as far as it is taken now, and the rest when it can be taken. Nothing happens if the
        conversation has ended meanwhile."""
        if self.sock.fileno() < 0:
            return  # it has been too long
        self._answer = memoryview(response.to_bytes(with_body=self._with_body))
        with contextlib.suppress(KeyError, ValueError):
            self._server.selector.unregister(self.sock)
        self._server.selector.register(self.sock, selectors.EVENT_WRITE, self.on_ready)
        self.on_ready()

    def _write(self) -> None:
        assert self._answer is not None
        self._answer = self._answer[self.sock.send(self._answer) :]
        if not self._answer:
            self.sock.shutdown(socket.SHUT_WR)
            self._goodbye = 0
            self.until = time.monotonic() + GOODBYE_TIMEOUT
            self._server.selector.modify(self.sock, selectors.EVENT_READ, self.on_ready)

    def _linger(self) -> None:
        data = self.sock.recv(MAX_GOODBYE)
        self._goodbye += len(data)
        if not data or self._goodbye > MAX_GOODBYE:
            self.close()

    def close(self) -> None:
        """End the connection, whether it has its answer or not. It may be called again."""
        self._server.forget(self)
        with contextlib.suppress(KeyError, ValueError):
            self._server.selector.unregister(self.sock)
        self.sock.close()


Ask = Callable[[Request, Conversation], None]
"""Answers the conversation, now or later; HttpError is answered too."""


class Server:
    """One of the sockets, and all who talk there. The data of what it registers is the method to call."""

    def __init__(self, selector: selectors.BaseSelector, admin: AdminSocket, ask: Ask) -> None:
        self.selector = selector
        self.admin = admin
        self.ask = ask
        self._open: dict[socket.socket, Conversation] = {}
        self._listening = False
        self._not_before = 0.0
        self._listen()

    def debug_state(self) -> dict[str, int]:
        """For tests: `conversations` that are open."""
        return {"conversations": len(self._open)}

    def _listen(self) -> None:
        wanted = len(self._open) < MAX_CONVERSATIONS and time.monotonic() >= self._not_before
        if wanted and not self._listening:
            self.selector.register(self.admin.sock, selectors.EVENT_READ, self._on_connection)
        elif self._listening and not wanted:
            self.selector.unregister(self.admin.sock)
        self._listening = wanted

    @bugs_stay_here()
    def _on_connection(self) -> None:
        if not self._listening:
            return  # not any more, since the same turn of the loop
        try:
            sock, _ = self.admin.sock.accept()
        except BlockingIOError:
            return
        except OSError:
            self._not_before = time.monotonic() + FULL_PAUSE  # no descriptor is left, or it has gone already
            self._listen()
            return
        sock.setblocking(False)
        conversation = self._open[sock] = Conversation(self, sock)
        self.selector.register(sock, selectors.EVENT_READ, conversation.on_ready)
        if not self.admin.admits(sock):
            conversation.answer(http.problem(HTTPStatus.FORBIDDEN, "only root and the account of this relay may ask"))
        self._listen()

    def forget(self, conversation: Conversation) -> None:
        """Make room for another one: this conversation has ended."""
        self._open.pop(conversation.sock, None)
        self._listen_again()

    def _listen_again(self) -> None:
        if self.admin.sock.fileno() >= 0:
            self._listen()

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: not before something comes."""
        times = [conversation.until for conversation in self._open.values()]
        if not self._listening and len(self._open) < MAX_CONVERSATIONS:
            times.append(self._not_before)
        return min(times, default=None)

    @bugs_stay_here()
    def tick(self, now: float) -> None:
        """End the conversations that have taken too long; `now` is time.monotonic()."""
        for conversation in list(self._open.values()):
            if now >= conversation.until:
                conversation.close()
        self._listen_again()

    def close(self) -> None:
        """Listen no more, and end all conversations."""
        if self._listening:
            self.selector.unregister(self.admin.sock)
            self._listening = False
        self.admin.close()
        for conversation in list(self._open.values()):
            conversation.close()
