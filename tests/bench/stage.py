"""The network on which everything is measured: the lab's three hosts, the load generator at both ends, and for each
relay a port of its own that is steered to it.

What is steered to a relay that does not listen is dropped: TPROXY itself would let it pass, and a relay that has failed
to start would be measured as the fastest of all.
"""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from generator import HERE, Client, Server, compiled
from usage import Look, look

from tproxy_relay.lab import Host, Lab

FIRST_PORT = 8100
"""Of the server; each relay has one after it."""
PORTS = 16
FIRST_LISTENER, LISTENERS = 16000, 64
"""On the relay's host; each relay has some of them."""
MARK, TABLE = 0x100, 100
"""Of the rules for the other relays; ours brings its own."""

# Not for bare SYNs: one may find an old connection of its own addresses in TIME_WAIT, and "socket" would give it that.
_KNOWN = f"tcp flags & (fin|syn|rst|ack) != syn socket transparent 1 meta mark set {MARK} accept"

_RULES = """\
table inet bench
delete table inet bench
table inet bench {{
  chain prerouting {{
    type filter hook prerouting priority mangle; policy accept;
    iifname "rs" tcp sport {{ {ports} }} {known}
    iifname "rc" tcp dport vmap {{ {verdicts} }}
  }}
{chains}}}
"""
_CHAIN = """\
  chain to_{port} {{
    {known}
    meta l4proto tcp meta nfproto ipv4 tproxy ip to :{listener} meta mark set {mark} accept
    meta l4proto tcp meta nfproto ipv6 tproxy ip6 to :{listener} meta mark set {mark} accept
    drop
  }}
"""

_SYSCTLS: dict[str, object] = {
    # 9,000 connections in and 9,000 out, over and over.
    "net.ipv4.ip_local_port_range": "1024 65535",
    "net.core.somaxconn": 65535,
    # "socket transparent" finds a relay's listener, too, for an answer to a client that came from a port of its number:
    # the client's connection, whoever relays it or nobody, would stall at its first packet.
    "net.ipv4.ip_local_reserved_ports": f"{FIRST_LISTENER}-{FIRST_LISTENER + LISTENERS - 1}",
}
_TOLD = (
    *("net.ipv4.tcp_congestion_control", "net.ipv4.tcp_tw_reuse", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"),
    *_SYSCTLS,
)
"""They belong to the result."""


class Stage:
    """In a `with`."""

    def __init__(self) -> None:
        self.lab = Lab()
        self.folder = Path(tempfile.mkdtemp(prefix="tproxy-relay-bench-"))
        self._undo = contextlib.ExitStack()
        self._steered: dict[int, int] = {}
        self._running: set[int] = set()

    def __enter__(self) -> "Stage":
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._load = compiled(sorted((HERE / "load").glob("*.c")), self.folder / "load")
            stack.enter_context(self.lab)
            for host in self.lab.hosts:
                for name, value in _SYSCTLS.items():
                    host.set_sysctl(name, value)
            self.server = Server(self.lab.server, self._load, range(FIRST_PORT, FIRST_PORT + PORTS))
            stack.callback(self.server.close)
            for family in ("-4", "-6"):
                lines = (
                    f"rule add pref 100 fwmark {MARK} lookup {TABLE}\nroute add local default dev lo table {TABLE}\n"
                )
                self.lab.relay.run(["ip", family, "-batch", "-"], input=lines)
            self._undo = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.__exit__(kind, error, trace)

    def steer(self, port: int, listener: int) -> None:
        """What the client sends to this port of the server, to the relay that listens there."""
        self._steered[port] = listener
        chains = [_CHAIN.format(port=one, known=_KNOWN, listener=to, mark=MARK) for one, to in self._steered.items()]
        verdicts = ", ".join(f"{one} : goto to_{one}" for one in self._steered)
        ports = ", ".join(map(str, self._steered))
        rules = _RULES.format(known=_KNOWN, ports=ports, verdicts=verdicts, chains="".join(chains))
        self.lab.relay.run(["nft", "-f", "-"], input=rules)

    @contextlib.contextmanager
    def client(self, mode: str, port: int, *arguments: object, family: int = 4) -> Iterator[Client]:
        """The generator at the client's end."""
        server = self.lab.server
        address = server.ipv6 if family == 6 else server.ipv4
        with Client(self.lab.client, self._load, mode, address, port, *arguments) as client:
            with self._counted(client.pid):
                yield client

    @contextlib.contextmanager
    def beside(self, host: Host, argv: Sequence[str]) -> Iterator[None]:
        """A program that runs meanwhile, and counts as ours."""
        with host.start(argv, stdout=subprocess.DEVNULL) as process:
            try:
                with self._counted(process.pid):
                    yield
            finally:
                process.kill()

    def look(self, relay: Sequence[int]) -> Look:
        """At the accounts of the machine, with these processes of the relay."""
        return look(relay, [self.server.pid, *self._running])

    def settings(self) -> dict[str, str]:
        """Of the hosts, as far as they matter; all three have the same."""
        return {name: " ".join(self.lab.relay.sysctl(name).split()) for name in _TOLD}

    @contextlib.contextmanager
    def _counted(self, pid: int) -> Iterator[None]:
        self._running.add(pid)
        try:
            yield
        finally:
            self._running.discard(pid)
