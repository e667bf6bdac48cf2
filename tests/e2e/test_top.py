"""The relay on a full screen, in a real terminal, with real connections."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import pytest
import terminal
from admin_views import PORT, Ends, client_name, close_all, connect
from deadlines import wait_until
from relay_fixtures import intercepting_relay
from terminal import Terminal

from tproxy_relay.lab import Lab, RelayProcess

pytestmark = pytest.mark.slow

CONNECTIONS = 12
SIZES = {"80x24": (80, 24), "200x50": (200, 50)}


@pytest.fixture(autouse=True)
def tmux(require_or_skip: Callable[[str], NoReturn]) -> None:
    if terminal.program() is None:
        require_or_skip("tmux is not installed")


relay = intercepting_relay((PORT,), "--workers", "2", "--idle-timeout", "300")


@pytest.fixture
def ends(lab: Lab, relay: RelayProcess) -> Iterator[list[Ends]]:
    """Intercepted connections; the later, the more bytes they have moved."""
    found: list[Ends] = []
    with lab.server.listen(PORT) as server:
        for number in range(CONNECTIONS):
            client, served = connect(lab, server)
            served.sendall(b"y" * 5000 * number)
            found.append((client, served))
        yield found
        close_all(*found)


def top(lab: Lab, *words: str) -> list[str]:
    return lab.relay.command([sys.executable, "-m", "tproxy_relay", "top", "--config", "/dev/null", *words])


def clients(screen: Terminal) -> list[str]:
    """In the order of the screen."""
    return re.findall(r"^(10\.81\.1\.2:\d+)", screen.text, re.MULTILINE)


def is_as_before(screen: Terminal) -> None:
    """The shell's terminal: what was typed there is to be seen again, and so is what is typed now."""
    screen.wait_for("tproxy_relay top", gone=["? help", "asking the relay"])
    screen.wait_for_shell()
    modes = screen.modes()
    assert {"icanon", "echo", "isig", "icrnl", "opost"} <= modes, modes


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_shown_sorted_chosen_and_aborted(
    lab: Lab, relay: RelayProcess, ends: list[Ends], size: tuple[int, int]
) -> None:
    names = [client_name(both) for both in ends]
    with Terminal(*size, top(lab)) as screen:
        shown = screen.wait_for(f"{CONNECTIONS} of {CONNECTIONS} by rate", f"process {relay.pid}, running")
        assert f"{CONNECTIONS} connections of at most" in shown and f"{lab.server.ipv4}:{PORT}" in shown
        assert ("rtt ms" in shown) == (size[0] == 200)
        screen.type("s")
        wait_until(lambda: "by bytes" in screen.text and clients(screen) == names[::-1], "the largest first")
        screen.type("r")
        wait_until(lambda: "by bytes reversed" in screen.text and clients(screen) == names, "and the smallest")
        screen.type("?")
        screen.wait_for("abort the one that is chosen", gone=names)
        screen.type("?")
        screen.wait_for(names[0])
        screen.type("Down", "Down", "k")
        screen.wait_for(f"reset {names[1]} to {lab.server.ipv4}:{PORT}, both ends? y/n")
        screen.type("n")
        screen.wait_for(gone=["y/n"])
        assert not relay.records()
        screen.type("k", "y")
        screen.wait_for("aborted ", gone=[names[1]])
        assert relay.record_of(ends[1][0])["outcome"] == "aborted"
        with pytest.raises(ConnectionResetError):
            ends[1][1].recv(1)
        screen.type("q")
        is_as_before(screen)


def test_only_some(lab: Lab, relay: RelayProcess, ends: list[Ends]) -> None:
    with Terminal(80, 24, top(lab, "--show", f"port={PORT},sort=age")) as screen:
        screen.wait_for("12 of 12 by age", f"only port={PORT}")
        screen.type("/", *["BSpace"] * 20, "state=half-closed", "Enter")
        screen.wait_for("0 of 0 by age", "only state=half-closed")
        ends[3][0].shutdown(socket.SHUT_WR)
        screen.wait_for("1 of 1 by age", client_name(ends[3]))
        screen.type("/", "x", "Enter")
        screen.wait_for("'half-closedx' is not one of")
        screen.type("/", "Escape")
        screen.wait_for("1 of 1 by age", "only state=half-closed")
        screen.type("/", *["BSpace"] * 20, "Enter")
        screen.wait_for("12 of 12 by age", gone=["| only "])


def test_it_moves_and_stands_still(lab: Lab, relay: RelayProcess, ends: list[Ends]) -> None:
    with Terminal(80, 24, top(lab)) as screen:
        name = client_name(ends[0])
        screen.wait_for("12 of 12", name)
        close_all(ends[0])
        screen.wait_for("11 of 11", gone=[name])
        screen.type("p")
        screen.wait_for("STANDS STILL")
        close_all(ends[1])
        wait_until(lambda: len(relay.records()) == 2, "it has ended")
        time.sleep(1.5)  # longer than it takes to look again
        assert "11 of 11" in screen.text
        screen.type("p")
        screen.wait_for("10 of 10", gone=["STANDS STILL"])


def test_larger_smaller_and_too_small(lab: Lab, relay: RelayProcess, ends: list[Ends]) -> None:
    with Terminal(80, 24, top(lab)) as screen:
        screen.wait_for("12 of 12", gone=["rtt ms"])
        screen.resize(200, 50)
        screen.wait_for("rtt ms", "12 of 12")
        screen.resize(80, 12)
        screen.wait_for("5 of 12")
        screen.resize(40, 8)
        screen.wait_for("this needs 60 columns")
        screen.resize(80, 24)
        screen.wait_for("12 of 12", gone=["this needs"])
        screen.type("q")
        is_as_before(screen)


def test_the_terminal_is_as_before_whatever_happens(lab: Lab, relay: RelayProcess, ends: list[Ends]) -> None:
    """Ctrl-C, a signal, and a bug."""
    with Terminal(80, 24, top(lab)) as screen:
        screen.wait_for("12 of 12")
        screen.type("C-c")
        is_as_before(screen)
    words = ["--config", "/dev/null", "--ports", "15002,15006"]  # nobody else's of the tests that run beside this one
    with Terminal(80, 24, top(lab, *words[2:])) as screen:
        screen.wait_for("12 of 12")
        os.kill(pid_of([sys.executable, "-m", "tproxy_relay", "top", *words]), signal.SIGTERM)
        is_as_before(screen)
    bug = "import tproxy_relay.cli.top_view as view; view.lines = None; from tproxy_relay.cli.main import main; main()"
    command = lab.relay.command([sys.executable, "-c", bug, "top", "--config", "/dev/null"])
    with Terminal(80, 24, command) as screen:
        screen.wait_for("TypeError")
        screen.wait_for_shell()
        assert {"icanon", "echo", "isig"} <= screen.modes()


def pid_of(words: Sequence[str]) -> int:
    """The process with these arguments."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", encoding="utf-8", errors="replace") as command:
                if command.read().rstrip("\0").split("\0") == list(words):
                    return int(name)
        except OSError:
            continue  # it has ended
    raise AssertionError(words)


def test_the_relay_ends_meanwhile(lab: Lab, relay: RelayProcess, ends: list[Ends]) -> None:
    with Terminal(80, 24, top(lab)) as screen:
        screen.wait_for("12 of 12")
        relay.kill()
        screen.wait_for("cannot ask the relay")
        screen.type("q")
        is_as_before(screen)


def test_what_is_no_terminal(lab: Lab, relay: RelayProcess) -> None:
    done = subprocess.run(top(lab), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (71, "")
    assert "top needs a terminal, and this is none; `tproxy-relay status`" in done.stderr
    for name, why in (("dumb", "'dumb' cannot move its cursor"), ("no-such", "'no-such' is not known here")):
        with Terminal(120, 24, ["env", f"TERM={name}", *top(lab)]) as screen:
            screen.wait_for(why)
