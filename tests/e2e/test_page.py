"""The page at /, in a real browser, of a real relay, with real traffic."""

import contextlib
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import browser
import pytest
from admin_views import ADMIN, PORT, client_name, close_all, connect
from browser import Browser
from relay_fixtures import intercepting_relay

from tproxy_relay.lab import Lab, RelayProcess

pytestmark = pytest.mark.slow

PICTURES = os.environ.get("PICTURES")
"""A folder for pictures of the page, for people to look at."""


@pytest.fixture(autouse=True)
def chromium(require_or_skip: Callable[[str], NoReturn]) -> None:
    if lacking := browser.missing():
        require_or_skip(f"{lacking} is not installed")


relay = intercepting_relay((PORT,), "--admin", f"127.0.0.1:{ADMIN}", "--idle-timeout", "300", "--workers", "2")


@pytest.fixture
def page(lab: Lab, relay: RelayProcess) -> Iterator[Browser]:
    with Browser(lab.relay, ADMIN) as opened:
        opened.wait(lambda: opened.text("#health") == "ok", "the first answer")
        yield opened


def heights(page: Browser, selector: str) -> set[str]:
    """Of the points of a plot, from its top."""
    return set(
        re.findall(
            r" ([\d.]+)", page.run("return document.querySelector(arguments[0])?.getAttribute('d') || ''", selector)
        )
    )


def keep(page: Browser, name: str) -> None:
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")


def test_a_connection_appears_moves_and_goes(lab: Lab, page: Browser, server: socket.socket) -> None:
    assert page.text("#count") == "0" and page.texts("#sessions tbody tr") == []
    both = connect(lab, server)
    name = client_name(both)
    page.wait(lambda: any(name in row for row in page.texts("#sessions tbody tr")), "it appears")
    assert f"{lab.server.ipv4}:{PORT}" in page.texts("#sessions tbody tr")[0]
    for _ in range(3):
        both[1].sendall(b"y" * 300_000)
        got = 0
        while got < 300_000:
            got += len(both[0].recv(1 << 20))
        page.wait(lambda: len(heights(page, "#throughput .down")) > 1, "the plot moves")
    assert heights(page, "#throughput .up") == {"98.0"}, "nothing went up"
    assert len(heights(page, "#arrivals .new")) > 1
    page.wait(lambda: "879 KiB so far" in page.text("#cards"), "it is counted")
    keep(page, "moving")
    close_all(both)
    page.wait(lambda: page.texts("#sessions tbody tr") == [] and page.text("#count") == "0", "it goes")
    page.wait(lambda: "completed\t1" in page.texts("#outcomes tr"), "and how it ended is seen")
    assert page.complaints() == []


def test_search_and_order(lab: Lab, page: Browser, server: socket.socket) -> None:
    ends = [connect(lab, server) for _ in range(6)]
    names = [client_name(both) for both in ends]

    def shown() -> list[str]:
        return page.texts("#sessions tbody tr td:first-child")

    page.wait(lambda: sorted(shown()) == sorted(names), "all of them")
    page.click("#sessions th:nth-child(6) button")  # age
    page.wait(lambda: shown() == names, "the oldest first")
    assert page.run("return document.querySelector('th[aria-sort]').innerText") == "Age"
    page.click("#sessions th:nth-child(6) button")
    page.wait(lambda: shown() == names[::-1], "the youngest first")
    page.type("#search", names[2].partition(":")[2])
    page.wait(lambda: shown() == [names[2]], "one of them")
    page.type("#search", "nobody")
    page.wait(lambda: shown() == [] and page.text("#count") == "0", "none")
    page.run(
        "const field = document.querySelector('#search'); field.value = ''; field.dispatchEvent(new Event('input'))"
    )
    page.wait(lambda: len(shown()) == 6, "all again")
    close_all(*ends)


def test_why_something_was_refused(lab: Lab, page: Browser) -> None:
    with contextlib.suppress(ConnectionResetError), lab.client.connect(lab.server.ipv4, PORT) as client:
        client.recv(1)
    page.wait(lambda: "connect-refused: Connection refused" in page.text("#refused"), "it is said")
    assert f"to {lab.server.ipv4}:{PORT}" in page.text("#refused")


def test_light_and_dark(page: Browser) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    page.prefer("light")
    assert page.run(ground) == "rgb(255, 255, 255)"
    keep(page, "light")
    page.prefer("dark")
    assert page.run(ground) == "rgb(20, 24, 31)"
    keep(page, "dark")


def test_on_a_phone(lab: Lab, page: Browser, server: socket.socket) -> None:
    both = connect(lab, server)
    page.become(375, 700, mobile=True)
    page.wait(lambda: page.texts("#sessions tbody tr"), "a connection")
    assert page.run("return [document.documentElement.scrollWidth, innerWidth]") == [375, 375], "nothing is beside it"
    cells = "[...document.querySelectorAll('#sessions td')].filter(one => one.offsetParent)"
    shown = page.run(f"return {cells}.map(one => one.innerText)")
    assert len(shown) == 4 and shown[:2] == [client_name(both), f"{lab.server.ipv4}:{PORT}"]
    right = (
        "return Math.max(...[...document.querySelectorAll('.card, td')].map(one => one.getBoundingClientRect().right))"
    )
    assert page.run(right) <= 375
    keep(page, "phone")
    close_all(both)


def test_it_needs_nothing_from_elsewhere(page: Browser) -> None:
    hosts = set(page.run("return performance.getEntriesByType('resource').map(one => new URL(one.name).host)"))
    assert hosts == {page.run("return location.host")}
    script = "const made = document.createElement('script'); made.textContent = 'window.evil = 1';"
    page.run(f"{script} document.body.append(made)")
    assert page.run("return window.evil") is None, "no other script runs"
    assert any("Content Security Policy" in line for line in page.complaints())


def test_the_relay_ends_and_comes_back(lab: Lab, relay: RelayProcess, page: Browser) -> None:
    relay.stop()
    page.wait(lambda: page.text("#health") == "no answer", "it says so")
    assert "what is shown is old" in page.text("#complaints")
    with lab.relay_process(*relay.options):
        page.wait(lambda: page.text("#health") == "ok", "it goes on by itself")
        assert not page.text("#complaints")
