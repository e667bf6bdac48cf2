"""`tproxy-relay top`: a running relay on a full screen, as it changes.

A thread asks the relay; the main thread draws and takes keys, so a relay that answers late does not make the keys late.
"""

import contextlib
import curses
import locale
import os
import signal
import sys
import threading
from typing import Any

from tproxy_relay import session_query
from tproxy_relay.admin import client
from tproxy_relay.admin.client import Client
from tproxy_relay.cli import top_view
from tproxy_relay.cli.top_view import View
from tproxy_relay.errors import RelayError, SystemRefusedError, UsageError
from tproxy_relay.settings import Settings

INTERVAL = 1.0
"""Seconds between two questions to the relay."""
KEY_TIMEOUT = 200
"""Milliseconds for a key, before the screen is drawn again."""
ESCAPE, ENTER, ERASE = 27, (10, 13, curses.KEY_ENTER), (8, 127, curses.KEY_BACKSPACE)


def run(settings: Settings, show: dict[str, str]) -> int:
    """Show the relay until q is pressed; `show` are filters, and the order at first. Returns the exit code. Raises
    RelayError, also for a terminal that cannot show it; the terminal is as before in any case."""
    relay = client.find(settings)
    _require_terminal()
    locale.setlocale(locale.LC_ALL, "")
    os.environ.setdefault("ESCDELAY", "25")
    signal.signal(signal.SIGTERM, _leave)  # else the terminal would stay as it is now
    signal.signal(signal.SIGHUP, _leave)
    view = View(sort=show.get("sort", "rate"), reverse=show.get("reverse") == "yes")
    view.show = {name: text for name, text in show.items() if name not in ("sort", "reverse", "limit")}
    curses.wrapper(lambda screen: Top(relay, view, screen).run())
    return 0


def _leave(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _require_terminal() -> None:
    how = "; `tproxy-relay status` and `tproxy-relay sessions` need none"
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise SystemRefusedError(f"top needs a terminal, and this is none{how}")
    try:
        curses.setupterm()
    except curses.error as error:
        raise SystemRefusedError(
            f"the terminal {os.environ.get('TERM', '')!r} is not known here ({error}){how}"
        ) from None
    if not all(curses.tigetstr(name) for name in ("cup", "clear")):
        raise SystemRefusedError(f"the terminal {os.environ['TERM']!r} cannot move its cursor{how}")


class Poller:
    """The thread that asks the relay, every INTERVAL and on demand, and puts the answers into the view."""

    def __init__(self, relay: Client, view: View) -> None:
        self._relay = relay
        self._view = view
        self._rows = 20
        self._now, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="poller", daemon=True).start()

    def poll(self, rows: int) -> None:
        """Ask now, for a screen of so many rows. Returns before the answer is there."""
        self._rows = rows
        self._now.set()

    def end(self) -> None:
        """Ask no more. The thread may still wait for an answer; it does not keep the process from ending."""
        self._ended.set()
        self._now.set()

    def _run(self) -> None:
        while not self._ended.is_set():
            self._now.clear()
            if not self._view.paused:
                self._ask()
            self._now.wait(INTERVAL)

    def _ask(self) -> None:
        view = self._view
        query = view.query(top_view.room_for_sessions(self._rows))
        try:
            status = self._relay.get("/status")
            found = self._relay.get("/sessions", query)
        except RelayError as error:
            view.trouble = str(error)
            return
        view.status, view.sessions, view.matching = status, found["sessions"], found["matching"]
        view.trouble = ""


class Top:
    """The screen and the keys; poller and view are its own."""

    def __init__(self, relay: Client, view: View, screen: Any) -> None:
        self._relay = relay
        self._view = view
        self._screen = screen
        self._styles = {"": curses.A_NORMAL, "bold": curses.A_BOLD, "reverse": curses.A_REVERSE, "bad": curses.A_BOLD}
        with contextlib.suppress(curses.error):
            curses.curs_set(0)
            curses.use_default_colors()
            curses.init_pair(1, curses.COLOR_RED, -1)
            self._styles["bad"] = curses.color_pair(1) | curses.A_BOLD
        screen.timeout(KEY_TIMEOUT)
        self._poller = Poller(relay, view)

    def run(self) -> None:
        """Draw and take keys until one of them is q."""
        try:
            self._poller.poll(self._screen.getmaxyx()[0])
            while True:
                self._draw()
                key = self._screen.getch()
                if key in (ord("q"), ord("Q")):
                    return
                if key != -1:
                    self._handle(key)
        finally:
            self._poller.end()

    def _draw(self) -> None:
        with contextlib.suppress(OSError, curses.error):
            columns, rows = os.get_terminal_size()
            if (rows, columns) != self._screen.getmaxyx():  # the signal may come while nobody waits for a key
                curses.resizeterm(rows, columns)
        rows, columns = self._screen.getmaxyx()
        self._screen.erase()
        for number, line in enumerate(top_view.lines(self._view, rows, columns)):
            with contextlib.suppress(curses.error):  # it has just become smaller
                self._screen.addstr(number, 0, line.text, self._styles[line.style])
        self._screen.refresh()

    def _handle(self, key: int) -> None:
        view, page = self._view, self._screen.getmaxyx()[0] // 2
        view.note = ""
        moves = {curses.KEY_UP: -1, curses.KEY_DOWN: 1, curses.KEY_PPAGE: -page, curses.KEY_NPAGE: page}
        if key in moves:
            view.move(moves[key])
        elif key == ord("s"):
            view.next_sort()
        elif key == ord("r"):
            view.reverse = not view.reverse
        elif key == ord("p"):
            view.paused = not view.paused
        elif key in (ord("?"), ord("h")):
            view.help = not view.help
        elif key == ord("/"):
            self._choose()
        elif key == ord("k"):
            self._abort()
        self._poller.poll(self._screen.getmaxyx()[0])

    def _choose(self) -> None:
        """Ask which connections to show."""
        before = ",".join(f"{name}={text}" for name, text in self._view.show.items())
        text = self._ask_for("show only: ", before)
        if text is None:
            return
        try:
            pairs = [item.partition("=") for item in text.split(",") if item.strip()]
            show = {name.strip(): value.strip() for name, _, value in pairs}
            session_query.parse(show)
        except UsageError as error:
            self._view.note = str(error)
            return
        for name in ("sort", "reverse", "limit"):
            show.pop(name, None)
        self._view.show = show

    def _abort(self) -> None:
        """End the chosen connection, if the answer to a question is yes."""
        number = self._view.chosen
        one = next((one for one in self._view.sessions if one["id"] == number), None)
        if one is None:
            self._view.note = "choose a connection first, with the arrow keys"
            return
        answer = self._ask_for(f"reset {one['client']} to {one.get('orig_dst', '?')}, both ends? y/n ", "", most=1)
        if answer not in ("y", "Y"):
            return
        try:
            self._relay.abort(str(number))
            self._view.note = f"aborted {number}"
        except RelayError as error:
            self._view.note = str(error)

    def _ask_for(self, question: str, text: str, *, most: int = 200) -> str | None:
        """A line of text, at the foot of the screen; None for Escape. It goes on without Enter at `most` characters."""
        try:
            while len(text) < most:
                self._view.question = f"{question}{text}_"
                self._draw()
                key = self._screen.getch()
                if key == ESCAPE:
                    return None
                if key in ENTER:
                    break
                if key in ERASE:
                    text = text[:-1]
                elif 32 <= key < 127:
                    text += chr(key)
            return text
        finally:
            self._view.question = None
