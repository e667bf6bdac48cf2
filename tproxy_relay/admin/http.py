"""As much of HTTP/1.1 as the admin interface speaks (RFC 9110, RFC 9112): one request in a connection, without a body.

Read with suspicion: whatever is odd gets an error and the end of the connection.
"""

import http.client
import ipaddress
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BytesIO

MAX_HEAD = 8192
"""Bytes of a request line and its header fields."""
END = b"\r\n\r\n"

JSON = "application/json"
TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Request:
    """A request, as it was understood."""

    method: str
    path: str
    query: Mapping[str, str]
    host: str | None
    """Of the Host field, without a port."""


@dataclass(frozen=True)
class Response:
    """The answer to a request, before it is bytes."""

    status: HTTPStatus
    kind: str
    body: bytes
    fields: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self, *, with_body: bool) -> bytes:
        """The bytes that go out. Answers are about now, and belong to nobody else's page."""
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.kind}",
            f"Content-Length: {len(self.body)}",
            "Connection: close",
            "Cache-Control: no-store",
            "X-Content-Type-Options: nosniff",
            "Cross-Origin-Resource-Policy: same-origin",
            *(f"{name}: {value}" for name, value in self.fields.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + (self.body if with_body else b"")


class HttpError(Exception):
    """Raised where a request cannot be served; `response` answers it."""

    def __init__(self, status: HTTPStatus, why: str, **fields: str) -> None:
        super().__init__(why)
        self.response = problem(status, why, **fields)


def problem(status: HTTPStatus, why: str, **fields: str) -> Response:
    """A response with one line of text that says what is wrong, and with these header fields."""
    return Response(status, TEXT, f"{why}\n".encode(), fields)


def document(what: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """A response with that as JSON, in one line."""
    return Response(status, JSON, json.dumps(what, separators=(",", ":")).encode() + b"\n")


def parse(head: bytes) -> Request:
    """The request in these bytes, from the request line to the empty line. Raises HttpError."""
    line, _, rest = head.partition(b"\r\n")
    words = line.decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1.") or not words[0].isascii() or not words[0].isalpha():
        raise HttpError(HTTPStatus.BAD_REQUEST, "this is no HTTP/1.1 request")
    try:
        fields = http.client.parse_headers(BytesIO(rest))
        target = urllib.parse.urlsplit(words[1])
        query = dict(urllib.parse.parse_qsl(target.query, keep_blank_values=True, strict_parsing=bool(target.query)))
    except (ValueError, http.client.HTTPException):
        raise HttpError(HTTPStatus.BAD_REQUEST, "this request cannot be understood") from None
    if "content-length" in fields and fields["content-length"].strip() != "0" or "transfer-encoding" in fields:
        raise HttpError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "a request here has no body")
    hosts = fields.get_all("host", [])
    if len(hosts) != 1 and words[2] != "HTTP/1.0":
        raise HttpError(HTTPStatus.BAD_REQUEST, "a request has one Host field")
    return Request(words[0], urllib.parse.unquote(target.path), query, _host(hosts[0]) if hosts else None)


def _host(text: str) -> str:
    """The host, without its port."""
    try:
        return urllib.parse.urlsplit(f"//{text}").hostname or ""
    except ValueError:
        return ""


def is_of_this_host(host: str | None) -> bool:
    """If a page that was loaded under this name is ours: another site's name may lead here too (DNS rebinding)."""
    if host is None:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
