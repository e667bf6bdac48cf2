"""The doctor as a person meets it: the program `check` in the relay's host of a lab, and a shell for its remedies."""

import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tproxy_relay.lab import Host


def program_in(folder: Path) -> Path:
    """Make a program `tproxy-relay` there, for remedies; the folder."""
    program = folder / "tproxy-relay"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tproxy_relay "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


@dataclass(frozen=True)
class Answer:
    """What `check --json` said."""

    code: int
    findings: list[dict[str, str]]

    @property
    def ills(self) -> list[dict[str, str]]:
        """All that is not well, but for what a connection through the rules has shown."""
        return [one for one in self.findings if one["level"] != "ok" and one["name"] != "self-probe"]

    def named(self, name: str) -> list[dict[str, str]]:
        return [one for one in self.findings if one["name"] == name and one["level"] != "ok"]

    @property
    def problems(self) -> list[dict[str, str]]:
        return [one for one in self.findings if one["level"] == "problem"]


class Doctor:
    """Runs the program in the relay's host."""

    def __init__(self, host: Host, command: Path) -> None:
        self.host = host
        self._path = f"{command}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

    def check(self, *options: str, wrapper: Sequence[str] = ()) -> Answer:
        argv = [*wrapper, sys.executable, "-m", "tproxy_relay", "check", "--config", "/dev/null", "--json", *options]
        done = self.host.run(argv, check=False)
        assert not done.stderr, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        assert said["ok"] == (done.returncode == 0)
        return Answer(done.returncode, said["findings"])

    def shell(self, line: str) -> str:
        return self.host.run(["env", f"PATH={self._path}", "sh", "-c", line]).stdout
