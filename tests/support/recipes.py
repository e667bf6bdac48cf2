"""The manual's recipes: taken from the text of its pages and run in the lab, where eth0 is called rc."""

import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

from tproxy_relay.lab import Host, Lab

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PATIENCE = 5.0
"""Seconds for what should happen at once."""
SILENCE = 1.5
"""Seconds after which no answer is one: a SYN is sent twice in them."""


def block(page: str, name: str) -> str:
    """The code block of that name."""
    found = re.search(rf"^( *):name: {name}\n\n((?:\1.*\n|\n)+)", (DOCS / page).read_text(), re.MULTILINE)
    assert found, f"{page} has no block {name}"
    return textwrap.dedent(found[2]).strip() + "\n"


def run(lab: Lab, script: str) -> "subprocess.CompletedProcess[str]":
    """Run a block in the relay's host, by sh, to its end or its first failure."""
    own = shlex.join([sys.executable, "-m", "tproxy_relay"])
    environment = f"export PYTHONPATH={shlex.quote(str(ROOT))} TPROXY_RELAY_CONFIG={os.devnull}\n"
    text = re.sub(r"^tproxy-relay ", lambda _: f"{own} ", script.replace("eth0", "rc"), flags=re.MULTILINE)
    return lab.relay.run(["sh", "-e"], input=environment + text)


def options(line: str) -> list[str]:
    """The options in a `tproxy-relay run` line of a block."""
    words = shlex.split(line.replace("eth0", "rc"), comments=True)
    while words[:2] != ["tproxy-relay", "run"]:
        words = words[1:]
    return words[2:]


def talk(
    client: Host, server: Host, port: int, family: int = socket.AF_INET, *, listen_port: int = 0, address: str = ""
) -> tuple[socket.socket, str]:
    """A connection with a byte in each direction and an end. The client's socket, still bound, and the address that
    the server saw. The server's port and address, if they are not what the client asks for, come after the family."""
    with server.listen(listen_port or port, family) as listener:
        listener.settimeout(PATIENCE)
        sock = client.connect(address or server.address(family), port, timeout=PATIENCE)
        accepted, peer = listener.accept()
        with accepted:
            accepted.settimeout(PATIENCE)
            sock.sendall(b"?")
            assert accepted.recv(1) == b"?"
            accepted.sendall(b"!")
        assert sock.recv(2) == b"!"
        assert sock.recv(1) == b""
        sock.shutdown(socket.SHUT_WR)
        return sock, str(peer[0])


def attempt(client: Host, address: str, port: int) -> str:
    """How the kernel answers somebody who connects."""
    try:
        client.connect(address, port, timeout=SILENCE).close()
    except ConnectionRefusedError:
        return "refused"
    except TimeoutError:
        return "no answer"
    return "connected"
