"""What asks the relay for `top`: answers and troubles arrive in the view. The screen itself is tried in e2e."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from deadlines import wait_until

from tproxy_relay.admin.client import Client
from tproxy_relay.cli import top
from tproxy_relay.cli.top_view import View
from tproxy_relay.settings import HostPort


class Relay(ThreadingHTTPServer):
    """Answers as a relay does, or refuses to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.refuses = False
        self.queries: list[dict[str, list[str]]] = []


class Answer(BaseHTTPRequestHandler):
    server: Relay

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        found: dict[str, object] = {"health": "ok"}
        if url.path == "/sessions":
            self.server.queries.append(parse_qs(url.query))
            found = {"sessions": [{"id": "1-1-1"}], "matching": 7, "silent": []}
        body = b"not now" if self.server.refuses else json.dumps(found).encode()
        self.send_response(503 if self.server.refuses else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def relay() -> Iterator[Relay]:
    with Relay() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_answers_and_troubles_arrive(relay: Relay) -> None:
    view = View(note="aborted 1-2-3")
    poller = top.Poller(Client(HostPort(*relay.server_address[:2])), view)
    try:
        poller.poll(30)
        wait_until(lambda: view.matching == 7 and ["23"] in [one["limit"] for one in relay.queries], "an answer")
        assert view.status == {"health": "ok"} and list(view.sessions) == [{"id": "1-1-1"}]
        assert (view.note, view.trouble) == ("aborted 1-2-3", "")

        relay.refuses = True
        poller.poll(30)
        wait_until(lambda: "not now" in view.trouble, "it says what is wrong")
        assert view.note == "aborted 1-2-3" and view.matching == 7

        relay.refuses = False
        poller.poll(30)
        wait_until(lambda: not view.trouble, "that is over")
        assert view.note == "aborted 1-2-3"
    finally:
        poller.end()
