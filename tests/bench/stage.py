"""The network on which everything is measured: the lab's three hosts, the load generator at both ends, and for each
relay a port of its own that is steered to it.

What is steered to a relay that does not listen is dropped: TPROXY itself would let it pass, and a relay that has failed
to start would be measured as the fastest of all.
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tproxy_relay.lab import Lab, LabError

HERE = Path(__file__).parent
FIRST_PORT = 8100
"""Of the server; each relay has one after it."""
PORTS = 16
MARK, TABLE = 0x100, 100
"""Of the rules for the other relays; ours has its own."""
PATIENCE = 120.0
"""Seconds for one run of the generator beyond what it measures."""

_RULES = f"""\
table inet bench {{
  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "rs" tcp flags & (fin|syn|rst|ack) != syn socket transparent 1 meta mark set {MARK} accept
    iifname != "rc" accept
    tcp dport vmap {{ PORTS }}
  }}
CHAINS}}
"""
_CHAIN = f"""\
  chain to_{{0}} {{{{
    tcp flags & (fin|syn|rst|ack) != syn socket transparent 1 meta mark set {MARK} accept
    meta l4proto tcp meta nfproto ipv4 tproxy ip to :{{1}} meta mark set {MARK} accept
    meta l4proto tcp meta nfproto ipv6 tproxy ip6 to :{{1}} meta mark set {MARK} accept
    drop
  }}}}
"""


class Stage:
    """In a `with`."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.folder = Path(tempfile.mkdtemp(prefix="tproxy-relay-bench-"))
        self._server: subprocess.Popen[bytes] | None = None
        self._steered: dict[int, int] = {}

    def __enter__(self) -> "Stage":
        self.load = compiled(HERE / "load/load.c", self.folder)
        self.lab.__enter__()
        for host in self.lab.hosts:
            # 9,000 connections in and 9,000 out, over and over.
            host.set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")
            host.set_sysctl("net.core.somaxconn", 65535)
        ports = map(str, range(FIRST_PORT, FIRST_PORT + PORTS))
        command = [str(self.load), "server", *ports]
        pipe = subprocess.PIPE
        self._server = self.lab.server.start(command, stdin=pipe, stdout=pipe)
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b"up\n":
            raise LabError("the load server did not start")
        for family in ("-4", "-6"):
            lines = f"rule add pref 100 fwmark {MARK} lookup {TABLE}\nroute add local default dev lo table {TABLE}\n"
            self.lab.relay.run(["ip", family, "-batch", "-"], input=lines)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            for pipe in (self._server.stdin, self._server.stdout):
                if pipe is not None:
                    pipe.close()
        self.lab.__exit__(kind, error, trace)
        shutil.rmtree(self.folder, ignore_errors=True)

    def steer(self, port: int, listener: int) -> None:
        """What the client sends to this port of the server, to the relay that listens there."""
        self._steered[port] = listener
        verdicts = ", ".join(f"{one} : goto to_{one}" for one in self._steered)
        chains = "".join(_CHAIN.format(one, there) for one, there in self._steered.items())
        rules = _RULES.replace("PORTS", verdicts).replace("CHAINS", chains)
        self.lab.relay.run(["nft", "-f", "-"], input=f"table inet bench\ndelete table inet bench\n{rules}")

    def address(self, family: int) -> str:
        """The server's, of IPv4 or 6."""
        return self.lab.server.ipv6 if family == 6 else self.lab.server.ipv4

    def measure(self, mode: str, port: int, *arguments: object, family: int = 4, seconds: float = 0.0) -> Any:
        """Run the generator at the client's end; what it says."""
        argv = [str(self.load), mode, self.address(family), str(port), *map(str, arguments)]
        done = self.lab.client.run(argv, timeout=PATIENCE + seconds)
        return json.loads(done.stdout)

    def start(self, mode: str, port: int, *arguments: object, family: int = 4) -> "subprocess.Popen[bytes]":
        """The generator beside others; it hears and says more than once, or its result counts for nothing."""
        argv = [str(self.load), mode, self.address(family), str(port), *map(str, arguments)]
        return self.lab.client.start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def compiled(source: Path, folder: Path) -> Path:
    """The program from one file of C. Raises LabError without a compiler."""
    if shutil.which("cc") is None:
        raise LabError("there is no C compiler: install gcc and libc6-dev")
    program = folder / source.stem
    command: Sequence[str] = ("cc", "-O2", "-pthread", "-o", str(program), str(source))
    subprocess.run(command, check=True)
    return program
