"""A relay that was started by hand, in real terminals and shells, and the terminal goes."""

import contextlib
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import terminal
from children import environment
from deadlines import PATIENCE, wait_until
from interception import EchoServer, attempt, ping, processes
from terminal import Terminal

from tproxy_relay.lab import Lab

PORT = 8000


class ByHand:
    """A relay whose command is typed into a shell. Its log is a file."""

    def __init__(self, lab: Lab, folder: Path, how: str, shell: str) -> None:
        self.lab = lab
        self.log = folder / "log"
        words = [sys.executable, "-m", "tproxy_relay", "run", "--config", "/dev/null", "--workers", "1"]
        words += ["--intercept-inbound", str(PORT), "--log-file", str(self.log), "--drain-timeout", "1"]
        command = f"env PYTHONPATH={environment()['PYTHONPATH']} {shlex.join(lab.relay.command(words))}"
        self.terminal = Terminal(120, 30, how.replace("RUN", command), shell=shell)
        try:
            self.wait_for("listening")
        except BaseException:
            self.close()
            raise

    def wait_for(self, *words: str) -> None:
        """Until the log has a line with all of these."""

        def there() -> bool:
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            return any(all(word in line for word in words) for line in lines)

        wait_until(there, f"{words} in the log", 2 * PATIENCE)

    @property
    def pid(self) -> int:
        """Of its supervisor."""
        (pid,) = processes(self.lab, "-m tproxy_relay run") or [0]
        return pid

    def intercepts(self) -> bool:
        """A connection that works is in its log."""
        with self.lab.client.connect(self.lab.server.ipv4, PORT) as sock:
            assert ping(sock) == ""
            name = f"{sock.getsockname()[0]}:{sock.getsockname()[1]}"
            with contextlib.suppress(AssertionError):
                wait_until(lambda: f"client={name}" in self.log.read_text(), "the connection in the log", 3)
            return f"client={name}" in self.log.read_text()

    def has_left_nothing(self) -> bool:
        return not self.pid and "tproxy_relay" not in self.lab.relay.run(["nft", "list", "ruleset"]).stdout

    def close(self) -> None:
        self.terminal.close()
        pid = self.pid
        if pid:
            self.lab.relay.run(["kill", "-INT", str(pid)])
        wait_until(self.has_left_nothing, "the end of the relay", PATIENCE)


@pytest.fixture
def by_hand(
    fresh_lab: Lab, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]
) -> Iterator[Callable[..., ByHand]]:
    """Call it with what is typed, RUN for the relay's command, and the shell."""
    if terminal.program() is None:
        require_or_skip("tmux is not installed")
    server = EchoServer(fresh_lab.server)
    with contextlib.ExitStack() as stack:

        def start(how: str, shell: str = "bash") -> ByHand:
            if shutil.which(shell) is None:
                require_or_skip(f"{shell} is not installed")
            made = ByHand(fresh_lab, tmp_path, how, shell)
            stack.callback(made.close)
            assert made.intercepts()
            return made

        yield start
    server.close()


@pytest.mark.parametrize(
    ("how", "shell"),
    [("RUN", "bash"), ("RUN &", "bash"), ("exec RUN", "bash"), ("RUN", "zsh"), ("timeout 600 RUN", "bash")],
)
def test_a_relay_whose_terminal_is_gone_stops(by_hand: Callable[..., ByHand], how: str, shell: str) -> None:
    relay = by_hand(how, shell)
    relay.terminal.hang_up()
    relay.wait_for("terminal gone, stopping")
    relay.wait_for("stopped")
    wait_until(relay.has_left_nothing, "the end of the relay", PATIENCE)
    assert attempt(relay.lab.client, relay.lab.server, 2) == ""


@pytest.mark.parametrize("how", ["nohup RUN", "nohup RUN &", "RUN & disown", "setsid RUN &"])
def test_a_relay_that_is_to_outlive_its_terminal_goes_on_and_reloads_on_hup(
    by_hand: Callable[..., ByHand], how: str
) -> None:
    relay = by_hand(how)
    relay.terminal.hang_up()
    if not how.startswith("setsid"):
        relay.wait_for("terminal gone, going on")
    assert relay.intercepts()
    relay.lab.relay.run(["kill", "-HUP", str(relay.pid)])
    relay.wait_for("reloaded")
    assert relay.intercepts()


def test_zsh_ends_the_job_that_it_is_left_with(by_hand: Callable[..., ByHand]) -> None:
    """It sends HUP to its jobs while the terminal is still there."""
    relay = by_hand("RUN &", "zsh")
    relay.terminal.type("exit", "Enter")
    relay.terminal.wait_for("running jobs")
    relay.terminal.type("exit", "Enter")
    relay.wait_for("terminal gone, stopping")
    wait_until(relay.has_left_nothing, "the end of the relay", PATIENCE)


def test_hup_from_elsewhere_reloads_while_the_terminal_is_there(by_hand: Callable[..., ByHand]) -> None:
    relay = by_hand("RUN")
    relay.lab.relay.run(["kill", "-HUP", str(relay.pid)])
    relay.wait_for("reloaded")
    assert relay.intercepts()


def test_ctrl_z_stops_the_supervisor_only(by_hand: Callable[..., ByHand]) -> None:
    """Connections go on, new ones too; nobody is reset when it goes on."""
    relay = by_hand("RUN")
    with relay.lab.client.connect(relay.lab.server.ipv4, PORT) as before:
        assert ping(before) == ""
        relay.terminal.type("C-z")
        relay.terminal.wait_for("Stopped")
        with relay.lab.client.connect(relay.lab.server.ipv4, PORT) as meanwhile:
            assert ping(before) == ping(meanwhile) == ""
            assert not relay.intercepts(), "its line waits"
            relay.terminal.type("fg", "Enter")
            wait_until(relay.intercepts, "lines in the log", PATIENCE)
            assert ping(before) == ping(meanwhile) == ""
        relay.terminal.type("C-z")
        relay.terminal.wait_for("Stopped")
    relay.terminal.hang_up()
    relay.wait_for("terminal gone, stopping")
    wait_until(relay.has_left_nothing, "the end of the relay", PATIENCE)
    assert attempt(relay.lab.client, relay.lab.server, 2) == ""
