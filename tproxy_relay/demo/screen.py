"""How the demo looks: 80 columns of plain ASCII, colour only for a terminal that wants it."""

import os
import sys
from collections.abc import Mapping
from typing import Any

_BOLD, _GREEN, _DIM, _PLAIN = "\033[1m", "\033[32m", "\033[2m", "\033[0m"

_SEEN = "   {:35} {:12} {:12} {}"
_ACCESS = "  {:17} {:16} {:7} {:14} {:>9} {:>9}"


class Unread(Exception):
    """Nobody reads our standard output any more."""


def title(text: str) -> None:
    """Print the title of a part of the story, after an empty line."""
    say("")
    say(_painted(_BOLD, text))


def say(text: str = "") -> None:
    """A line, out at once: the demo may be read through a pipe while it runs."""
    try:
        print(text, flush=True)
    except BrokenPipeError as error:
        # Python would complain once more at its end, about what is left in the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unread from error


def fact(label: str, value: str) -> None:
    """A measured fact with what it is, below a title."""
    say(f"     {label:9} {_painted(_GREEN, value)}")


def remark(text: str) -> None:
    """What is worth knowing about the facts."""
    say(_painted(_DIM, f"   {text}"))


def seen_head() -> None:
    """Print the names of the columns of `seen_line`."""
    say(_painted(_DIM, _SEEN.format("", "client saw", "server saw", "that is")))


def seen_line(how: str, client_saw: str, server_saw: str, meaning: str) -> None:
    """Whom each side took its peer for."""
    say(_SEEN.format(how, client_saw, server_saw, meaning))


def access_head() -> None:
    """Print the names of the columns of `access_line`."""
    say(_painted(_DIM, _ACCESS.format("client", "asked for", "shown", "outcome", "bytes up", "down")))


def access_line(record: Mapping[str, Any]) -> None:
    """One record of the relay's log, for people."""
    up, down = count(record["bytes_up"]), count(record["bytes_down"])
    asked_for = record.get("orig_dst", "-")
    say(_ACCESS.format(record["client"], asked_for, record["source"], record["outcome"], up, down))


def count(number: int) -> str:
    """A number of bytes, in at most nine characters."""
    return f"{number:,}" if number < 10_000_000 else f"{number / 1e6:,.0f} MB"


def _painted(colour: str, text: str) -> str:
    wanted = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return f"{colour}{text}{_PLAIN}" if wanted and text else text
