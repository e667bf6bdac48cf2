"""The examples of the manual for accounting, run as they stand there on the log of a real relay."""

import contextlib
import re
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from exchanges import PATIENCE, read_exactly

from tproxy_relay.lab import Lab

PORT = 8000
PAGE = (Path(__file__).parents[2] / "docs" / "access-log.rst").read_text(encoding="utf-8")


def examples() -> list[str]:
    """The literal blocks of the section, each as a script."""
    section = PAGE[PAGE.index("Accounting\n---") :]
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", section)
    return [textwrap.dedent(block) for block in blocks]


@pytest.fixture
def log(lab: Lab, tmp_path: Path, require_or_skip: Callable[[str], NoReturn]) -> Path:
    """Of three connections of one client, and a refused one."""
    for tool in ("jq", "sqlite3"):
        if shutil.which(tool) is None:
            require_or_skip(f"{tool} is not installed")
    path = tmp_path / "relay.log"
    lab.intercept((PORT, PORT + 1))
    with lab.server.listen(PORT) as server, lab.relay_process("--log-file", str(path)) as relay:
        for number in range(1, 4):
            with lab.client.connect(lab.server.ipv4, PORT) as client:
                served, peer = server.accept()
                with served:
                    assert peer[0] == lab.relay_address(), "it is intercepted"
                    client.sendall(b"x" * number)
                    served.sendall(b"y" * 1000 * number)
                    served.settimeout(PATIENCE)
                    assert len(read_exactly(served, number)) == number
                    assert len(read_exactly(client, 1000 * number)) == 1000 * number
        with contextlib.suppress(ConnectionResetError), lab.client.connect(lab.server.ipv4, PORT + 1) as client:
            client.recv(1)
        relay.stop()
    lab.stop_intercepting()
    return path


def test_the_examples_of_the_manual(lab: Lab, log: Path) -> None:
    talkers, refused, tables = examples()

    def run(script: str) -> list[list[str]]:
        done = subprocess.run(["sh", "-eu"], input=script, cwd=log.parent, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return [line.split() for line in done.stdout.splitlines()]

    assert run(talkers) == [[lab.client.ipv4, "4", "6", "6000"]]
    (line,) = run(refused)
    assert line[2:] == [f"{lab.server.ipv4}:{PORT + 1}", "connect-refused", "Connection", "refused"]
    head, _, first, second = run(tables)
    assert head == ["orig_dst", "outcome", "connections", "up", "down"]
    assert first == [f"{lab.server.ipv4}:{PORT}", "completed", "3", "6", "6000"]
    assert second == [f"{lab.server.ipv4}:{PORT + 1}", "connect-refused", "1", "0", "0"]
