"""A terminal of a given size, in which a program runs, with keys to type and a screen to read: tmux."""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

PATIENCE = 15.0


def program() -> str | None:
    """Its path, if it is installed."""
    return shutil.which("tmux")


class Terminal:
    """A server of tmux that is ours alone, with one window. `shell` runs in it, the command is typed into it."""

    def __init__(self, columns: int, rows: int, command: Sequence[str] | str, shell: str = "bash") -> None:
        """`command`: its words, or a line for the shell, which is bash or zsh."""
        self._folder = Path(tempfile.mkdtemp(prefix="tproxy-relay-tmux-"))
        self._socket = str(self._folder / "socket")
        where = ["-x", str(columns), "-y", str(rows), "-c", str(self._folder)]  # nohup leaves a file there
        (self._folder / "rc").write_text("PS1='PROMPT> '\n")
        shells = {"bash": ["bash", "--noprofile", "--rcfile", str(self._folder / "rc")], "zsh": ["zsh", "-f"]}
        environment = {**os.environ, "TERM": "screen-256color", "LC_ALL": "C.UTF-8", "PS1": "PROMPT> "}
        self._tmux("-f", os.devnull, "new-session", "-d", *where, *shells[shell], env=environment)
        self.wait_for("PROMPT>")
        self.type(command if isinstance(command, str) else shlex.join(command), "Enter")

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def hang_up(self) -> None:
        """The window is gone, as when the connection of an ssh session is; no error if it is already."""
        subprocess.run(["tmux", "-S", self._socket, "kill-server"], check=False, capture_output=True)

    def close(self) -> None:
        """Leave nothing. May be called again."""
        self.hang_up()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tmux(self, *words: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(["tmux", "-S", self._socket, *words], check=True, capture_output=True, text=True, env=env)
        return done.stdout

    @property
    def lines(self) -> list[str]:
        """What is on the screen."""
        return self._tmux("capture-pane", "-p").splitlines()

    @property
    def text(self) -> str:
        """The same in one piece."""
        return "\n".join(self.lines)

    def type(self, *keys: str) -> None:
        """Characters, or keys by tmux' names for them."""
        self._tmux("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """The window becomes larger or smaller."""
        self._tmux("resize-window", "-x", str(columns), "-y", str(rows))

    def wait_for(self, *texts: str, gone: Sequence[str] = ()) -> str:
        """Until all of these are on the screen, and none of those; what is there then."""
        deadline = time.monotonic() + PATIENCE
        while True:
            shown = self.text
            together = "".join(shown.split())  # what is typed goes on in the next line, and a blank may be lost there
            there = all("".join(text.split()) in together for text in texts)
            if there and not any(text in shown for text in gone):
                return shown
            assert time.monotonic() < deadline, f"no {texts} (without {gone}) on:\n{shown}"
            time.sleep(0.02)

    def wait_for_shell(self) -> None:
        """Until it can be typed into again."""
        deadline = time.monotonic() + PATIENCE
        while [line.strip() for line in self.lines if line.strip()][-1:] != ["PROMPT>"]:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def modes(self) -> set[str]:
        """What stty(1) says of the terminal, asked for by a shell that can be typed into."""
        self.type("clear; stty -a; echo END-'OF'-MODES", "Enter")
        return set(self.wait_for("END-OF-MODES").replace(";", " ").split())
