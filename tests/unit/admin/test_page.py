"""The page as it goes out: whole, from nowhere else, and with a policy that fits it."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from tproxy_relay.admin import page

RESPONSE = page.response()
BODY = RESPONSE.body.decode()
POLICY = RESPONSE.fields["Content-Security-Policy"]


class Whole(HTMLParser):
    """Counts what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "input", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_it_is_whole_and_from_nowhere_else() -> None:
    parser = Whole()
    parser.feed(BODY)
    assert parser.open == [] and parser.links == ["data:,"] and parser.handlers == []
    assert set(re.findall(r"https?://[^\"' ]+", BODY)) == {"http://www.w3.org/2000/svg"}, "a name, and no place"
    assert len(RESPONSE.body) < 30_000


def test_what_others_say_is_text() -> None:
    """Names of clients come from the network."""
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", BODY)


def test_the_policy_lets_in_what_is_there_and_nothing_else() -> None:
    for name in ("script", "style"):
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", BODY, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in POLICY
    assert POLICY.startswith("default-src 'none'; connect-src 'self'; ") and "unsafe-inline" not in POLICY
    assert "frame-ancestors 'none'" in POLICY
