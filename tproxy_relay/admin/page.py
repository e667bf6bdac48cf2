"""The page at /: one file without anything from elsewhere, so that it works where there is no other network.

Its scripts and styles are let in by their digests, and nothing else is (Content-Security-Policy), so that no name of a
client could ever become a program in somebody's browser.
"""

import base64
import hashlib
import re
from http import HTTPStatus
from pathlib import Path

from tproxy_relay.admin.http import Response


def response() -> Response:
    """The page, and the policy that fits it. Raises OSError if the file cannot be read."""
    body = Path(__file__).with_name("page.html").read_bytes()
    script, style = (_digest(body, name) for name in ("script", "style"))
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {script}; "
        f"style-src {style} 'unsafe-hashes' {' '.join(_of_attributes(body))}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    fields = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(HTTPStatus.OK, "text/html; charset=utf-8", body, fields)


def _digest(body: bytes, name: str) -> str:
    """Of the one element of that name."""
    (text,) = re.findall(rf"<{name}>(.*?)</{name}>".encode(), body, re.DOTALL)
    return _hash(text)


def _of_attributes(body: bytes) -> list[str]:
    return sorted({_hash(text) for text in re.findall(rb' style="([^"]*)"', body)})


def _hash(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
