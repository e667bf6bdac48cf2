"""What a relay in a lab says of its health, asked as a person does."""

import json
import sys
from collections.abc import Callable
from typing import Any

from deadlines import wait_until

from tproxy_relay.lab import Lab

SOON = 10.0
"""Seconds within which `status` is to know of a change, and within which what can be mended is."""

Document = dict[str, Any]


def status(lab: Lab) -> Document:
    """The document of `status --json`."""
    argv = [sys.executable, "-m", "tproxy_relay", "status", "--json", "--config", "/dev/null"]
    found: Document = json.loads(lab.relay.run(argv, check=False).stdout)
    return found


def status_once(lab: Lab, wanted: Callable[[Document], object], what: str, seconds: float = SOON) -> Document:
    """The first one of which that is true, which comes soon."""
    seen: list[Document] = []

    def asked() -> object:
        seen.append(status(lab))
        return wanted(seen[-1])

    wait_until(asked, what, seconds)
    return seen[-1]


def is_ok(document: Document) -> bool:
    """True if it complains of nothing."""
    return bool(document["health"] == "ok")


def names(document: Document) -> set[str]:
    """Of its problems."""
    return {one["name"] for one in document["problems"]}
