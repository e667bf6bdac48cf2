"""HAProxy as Debian has it, as a transparent TCP relay, to be compared with."""

import contextlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tproxy_relay.lab import Lab, LabError

PORT = 15006
"""Where the rules of the lab steer connections to."""
READY = 10.0

# What its manual has for the purpose. Its endings do not become those of a direct connection by any option:
# `option nolinger` makes resets of all of them, `option abortonclose` ends a connection at the client's half-close.
CONFIG = f"""
defaults
  mode tcp
  timeout connect {{connect}}s
  timeout client 1h
  timeout server 1h
listen relay
  bind 0.0.0.0:{PORT} transparent
  bind :::{PORT} transparent v6only
  server there 0.0.0.0
"""


def program() -> str | None:
    """Its path, if it is installed."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def running(lab: Lab, connect: int = 10) -> Iterator[int]:
    """It relays what the lab's rules steer to the relay; its pid. `connect`: seconds that it tries to connect."""
    path = program()
    if path is None:
        raise LabError("haproxy is not installed")
    with tempfile.TemporaryDirectory() as folder:
        config, said = Path(folder) / "haproxy.cfg", Path(folder) / "said"
        config.write_text(CONFIG.format(connect=connect))
        with said.open("wb") as out:
            process = lab.relay.start([path, "-db", "-f", str(config)], stdout=out, stderr=out)
        try:
            _await_listeners(lab, said)
            yield process.pid
        finally:
            process.kill()
            process.wait()


def _await_listeners(lab: Lab, said: Path) -> None:
    deadline = time.monotonic() + READY
    while time.monotonic() < deadline:
        found = {
            family
            for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, r"\[?::\]?|\*"))
            if re.search(rf"(^|\s)({address}):{PORT}\b", lab.relay.run(["ss", "-Hltn"]).stdout)
        }
        if len(found) == 2:
            return
        time.sleep(0.02)
    raise LabError(f"haproxy does not listen: {said.read_text(errors='replace')[-400:]}")
