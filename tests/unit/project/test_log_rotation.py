"""logrotate(8) with the shipped file, while a relay writes: every line is in one of the files, and whole."""

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from deadlines import wait_until
from relays import Relay
from rows import Seen

SHIPPED = Path(__file__).parents[3] / "etc" / "logrotate.d" / "tproxy-relay"
ROTATIONS = 10


def closed(folder: Path) -> list[str]:
    """The ids of all access lines of ended connections, in all files."""
    lines = [line for file in folder.glob("relay.log*") for line in file.read_text(encoding="utf-8").splitlines()]
    return [line["id"] for line in map(json.loads, lines) if line["message"] == "connection closed"]


@pytest.mark.slow
@pytest.mark.row("H17", "logrotate", "no line lost, none in the old file")
def test_no_line_is_lost(tmp_path: Path, require_or_skip: Callable[[str], NoReturn], seen: Seen) -> None:
    if shutil.which("logrotate", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        require_or_skip("logrotate is not installed")
    folder = tmp_path / "logs"
    folder.mkdir(0o750)
    rules = SHIPPED.read_text(encoding="utf-8").replace("/var/log/tproxy-relay", str(folder))
    assert str(folder) in rules
    # Compressed ones could not be compared; a rotation counts the files that are there.
    (tmp_path / "rules").write_text(rules.replace("    compress\n", "").replace("    delaycompress\n", ""))
    (tmp_path / "rules").chmod(0o644)
    rotate = ["/usr/sbin/logrotate", "--force", "--state", str(tmp_path / "state"), str(tmp_path / "rules")]
    with Relay(tmp_path, log_file=folder / "relay.log", log_level="info") as relay:
        count = 0
        for _ in range(ROTATIONS):
            for _ in range(30):
                client, server = relay.connect()
                client.close()
                server.close()
                count += 1
            done = subprocess.run(rotate, capture_output=True, text=True, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            old, inode = (folder / "relay.log.1").stat(), (folder / "relay.log.1").stat().st_ino
            client, server = relay.connect()
            client.close()
            server.close()
            count += 1
            wait_until(lambda: (folder / "relay.log").exists(), "it has opened a new one")
            wait_until(lambda: len(closed(folder)) == count, "all lines are there")
            size = (folder / "relay.log.1").stat().st_size
            assert (folder / "relay.log.1").stat().st_ino == inode and size == old.st_size
            assert (folder / "relay.log").stat().st_size
    assert len(list(folder.glob("relay.log.*"))) == ROTATIONS
    assert set(Counter(closed(folder)).values()) == {1} and len(closed(folder)) == count
    seen("none")
