"""The screen of `tproxy-relay top`, as lines of text: what is shown of a relay in so many rows and columns."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tproxy_relay.cli.humanize import amount, lasted, refusal
from tproxy_relay.session_query import SORTS

Document = Mapping[str, Any]

MIN_ROWS, MIN_COLUMNS = 10, 60
"""Of a terminal; below that nothing would be left for the connections."""
GAP = 2
CUT = "~"
"""Ends a cell that has more than fits."""

HELP = (
    "up, down, page up, page down    choose a connection",
    "k    abort the one that is chosen",
    "s    the next order                     r    the other way round",
    "/    show only some: client=10.0.0.0/8,port=443,state=open,min-rate=1000 ...",
    "     (all that `sessions --show` takes; nothing: all of them)",
    "p    stand still, and go on             q    leave",
    "?    this help, and away again",
)


class Column(NamedTuple):
    """One column of the table of connections; widths are in characters."""

    title: str
    width: int
    most: int
    """What it may grow to where there is room."""
    text: Callable[[Document], str]
    right: bool = False


COLUMNS = (
    Column("client", 21, 47, lambda one: str(one["client"])),
    Column("asked for", 21, 47, lambda one: str(one.get("orig_dst", "-"))),
    Column("rate", 10, 10, lambda one: f"{amount(one['rate_up'] + one['rate_down'])}/s", right=True),
    Column("age", 9, 11, lambda one: lasted(one["seconds"]), right=True),
    Column("state", 5, 11, lambda one: str(one["state"])),
    Column("idle", 9, 11, lambda one: lasted(one["idle_seconds"]), right=True),
    Column("to server", 9, 9, lambda one: amount(one["bytes_up"]), right=True),
    Column("to client", 9, 9, lambda one: amount(one["bytes_down"]), right=True),
    Column("rtt ms", 11, 15, lambda one: _pair(one, "rtt_ms"), right=True),
    Column("again", 7, 9, lambda one: _pair(one, "retransmits"), right=True),
    Column("ends", 20, 34, lambda one: _ends(one)),
    Column("id", 19, 26, lambda one: str(one["id"])),
)
"""In order of importance: those that fit are shown."""


@dataclass
class View:
    """What somebody has chosen to see, and what there is."""

    show: dict[str, str] = field(default_factory=dict)
    """As in `sessions --show`, but for sort, reverse and limit."""
    sort: str = "rate"
    reverse: bool = False
    chosen: str | None = None
    """The id of a connection."""
    paused: bool = False
    help: bool = False
    question: str | None = None
    """In the last line, instead of the keys."""
    note: str = ""
    """What the last key has done."""
    trouble: str = ""
    """Why the relay has not answered the last question; '' if it has."""
    status: Document | None = None
    sessions: Sequence[Document] = ()
    matching: int = 0

    def query(self, rows: int) -> dict[str, str]:
        """The query of /sessions that fills so many rows."""
        reverse = {"reverse": "yes"} if self.reverse else {}
        return {**self.show, "sort": self.sort, **reverse, "limit": str(max(1, rows))}

    def next_sort(self) -> None:
        """Take the next order of session_query.SORTS, after the last one the first."""
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]

    def move(self, rows: int) -> None:
        """Choose the connection so many rows further down, or further up if negative; the first or last at the end."""
        ids = [str(one["id"]) for one in self.sessions]
        if ids:
            now = ids.index(self.chosen) if self.chosen in ids else (-1 if rows > 0 else 0)
            self.chosen = ids[min(max(0, now + rows), len(ids) - 1)]


class Line(NamedTuple):
    """One line of the screen."""

    text: str
    style: str = ""
    """bold, reverse, or bad for what is wrong."""


def room_for_sessions(rows: int) -> int:
    """Connections that can be shown on a screen of so many rows."""
    return max(1, rows - 7)


def lines(view: View, rows: int, columns: int) -> list[Line]:
    """As many as the screen has rows, none longer than it has columns."""
    if rows < MIN_ROWS or columns < MIN_COLUMNS:
        small = Line(f"this needs {MIN_COLUMNS} columns and {MIN_ROWS} rows; q: leave")
        return _fitted([small], rows, columns)
    if view.status is None:
        return _fitted([Line(view.trouble or view.note or "asking the relay ...")], rows, columns)
    found = [*_head(view, view.status), Line("")]
    if view.help:
        found += [Line(text) for text in HELP]
    else:
        found += _table(view, room_for_sessions(rows), columns)
    found = found[: rows - 1] + [Line("")] * (rows - 1 - len(found))
    return _fitted([*found, _last(view)], rows, columns)


def _fitted(found: Sequence[Line], rows: int, columns: int) -> list[Line]:
    return [line._replace(text=_cut(line.text, max(0, columns - 1))) for line in found[:rows]]


def _head(view: View, status: Document) -> Iterator[Line]:
    connections, rates, sent = status["connections"], status["rates"], status["bytes"]
    last = connections["seconds_since_last"]
    yield Line(
        f"tproxy-relay {status['version']}, process {status['pid']}, {status['state']} for "
        f"{lasted(status['uptime_seconds'])}: {status['health']}",
        "bold",
    )
    yield Line(
        f"{connections['active']:,} connections of at most {connections['most']:,}; {connections['accepted']:,} so "
        f"far, {rates['accepted']:.1f}/s, the last {'never' if last is None else lasted(last) + ' ago'}"
    )
    yield Line(
        f"to servers {amount(rates['bytes_up'])}/s, {amount(sent['up'])} so far; "
        f"to clients {amount(rates['bytes_down'])}/s, {amount(sent['down'])} so far"
    )
    if status["complaints"]:
        yield Line(f"! {'; '.join(status['complaints'])}", "bad")
    elif status["last_refused"]:
        yield Line(f"refused: {refusal(status['last_refused'][0])}")
    else:
        yield Line("nothing was refused")


def _table(view: View, rows: int, columns: int) -> Iterator[Line]:
    chosen = fitting(columns - 1)
    yield Line(_row(chosen, [column.title for column, _ in chosen]), "reverse")
    for one in view.sessions[:rows]:
        style = "bold" if one["id"] == view.chosen else ""
        yield Line(_row(chosen, [column.text(one) for column, _ in chosen]), style)


def fitting(width: int) -> list[tuple[Column, int]]:
    """The columns that fit, and how wide each may be: the first ones get what is left over."""
    chosen: list[Column] = []
    left = width + GAP
    for column in COLUMNS:
        if column.width + GAP > left:
            break
        chosen.append(column)
        left -= column.width + GAP
    widths = []
    for column in chosen:
        more = min(left, column.most - column.width)
        left -= more
        widths.append(column.width + more)
    return list(zip(chosen, widths))


def _row(columns: Sequence[tuple[Column, int]], cells: Sequence[str]) -> str:
    parts = []
    for (column, width), cell in zip(columns, cells):
        text = _cut(cell, width)
        parts.append(text.rjust(width) if column.right else text.ljust(width))
    return (" " * GAP).join(parts)


def _last(view: View) -> Line:
    if view.question is not None:
        return Line(view.question, "bold")
    if view.trouble or view.note:
        return Line(view.trouble or view.note, "bad")
    only = ",".join(f"{name}={text}" for name, text in view.show.items())
    parts = [
        f"{len(view.sessions)} of {view.matching:,} by {view.sort}{' reversed' if view.reverse else ''}",
        *([f"only {only}"] if only else []),
        *(["STANDS STILL"] if view.paused else []),
        "q leave  s order  / only  k abort  ? help",
    ]
    return Line(" | ".join(parts), "reverse")


def _cut(text: str, width: int) -> str:
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return printable if len(printable) <= width else (printable[: max(0, width - 1)] + CUT)[:width]


def _pair(one: Document, what: str) -> str:
    """Towards the client, and towards the server."""
    return "/".join(f"{one[side]:.3g}" if (side := f"{leg}_{what}") in one else "-" for leg in ("client", "upstream"))


def _ends(one: Document) -> str:
    seconds = one.get("ending_in_seconds")
    return str(one.get("ending", "")) + ("" if seconds is None else f" in {lasted(seconds)}")
