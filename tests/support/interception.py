"""What the tests of interception share: the relay's own ruleset, echo servers, looks at the host, probes."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from tproxy_relay.lab import Host, Lab, RelayProcess

PORT = 8000
FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
BACKENDS = ("nft", "iptables-nft", "iptables-legacy")
OWN_SERVERS = ("--allow", "10.81.1.1,10.81.2.1,fd81:1::1,fd81:2::1")
"""For a relay that others steer to: it does not know that servers on its own host are meant."""
BOTH_WAYS = ("--intercept-inbound", str(PORT), "--intercept-outbound", str(PORT))

LEGACY_TABLES = ("raw", "mangle", "nat", "filter")
"""One by one: only the real root may read the list of them, /proc/net/ip_tables_names."""
LEGACY_SAVES = ("iptables-legacy-save", "ip6tables-legacy-save")
LOOKS = (
    ("nft", "-s", "list", "ruleset"),
    ("iptables-nft-save",),
    ("ip6tables-nft-save",),
    *((program, "-t", table) for program in LEGACY_SAVES for table in LEGACY_TABLES),
    *(("ip", family, "rule") for family in ("-4", "-6")),
    *(("ip", family, "route", "show", "table", "all") for family in ("-4", "-6")),
)

FOREIGN = """\
table inet neighbour {
  chain prerouting {
    type filter hook prerouting priority mangle; policy accept;
    meta mark 0x00004000 accept comment "somebody else's"
  }
}
"""


def furnish(lab: Lab) -> None:
    """Make the relay's host one on which others have rules too, and on which reading tables loads no more of them."""
    for program in LEGACY_SAVES:
        for table in LEGACY_TABLES:
            lab.relay.run([program, "-t", table])
    lab.relay.run(["nft", "-f", "-"], input=FOREIGN)
    for program in ("iptables-legacy", "iptables-nft"):
        lab.relay.run([program, "-t", "mangle", "-A", "PREROUTING", "-p", "udp", "-j", "ACCEPT"])
    lab.relay.run(["ip", "rule", "add", "pref", "9000", "fwmark", "0x4000/0x4000", "lookup", "main"])


def look(lab: Lab) -> str:
    """All rules and routes of the relay's host, without counters and the time of day."""
    lines = [line for argv in LOOKS for line in lab.relay.run(argv).stdout.splitlines()]
    return "\n".join(line.partition(" [")[0] if line.startswith(":") else line for line in lines if line[:1] != "#")


class EchoServer:
    """Sends back what it gets, on one host, both families; `peers` are those who have connected."""

    def __init__(self, host: Host, port: int = PORT, *, backlog: int = 128) -> None:
        self.peers: list[str] = []
        self._listeners = [host.listen(port, family, backlog) for family in FAMILIES.values()]
        self._live: set[socket.socket] = set()
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, peer = listener.accept()
                self.peers.append(peer[0])
                self._live.add(sock)
                threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    def _echo(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)

    def close(self) -> None:
        """End it and its connections."""
        for sock in (*self._listeners, *self._live):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@contextlib.contextmanager
def echo_servers(lab: Lab) -> Iterator[dict[str, EchoServer]]:
    """One on the server and one on the relay's host, by the name of the host."""
    servers = {host.name: EchoServer(host) for host in (lab.server, lab.relay)}
    try:
        yield servers
    finally:
        for server in servers.values():
            server.close()


def ways(lab: Lab) -> dict[str, tuple[Host, Host]]:
    """Who connects to whom, in each topology."""
    return {
        "gateway": (lab.client, lab.server),
        "host": (lab.client, lab.relay),
        "local": (lab.relay, lab.server),
    }


def ping(sock: socket.socket) -> str:
    """'' if an exchange works on it, else what went wrong."""
    sock.settimeout(5)
    sent = os.urandom(2000)
    try:
        sock.sendall(sent)
        got = b""
        while len(got) < len(sent):
            if not (data := sock.recv(65536)):
                return "EOF"
            got += data
    except OSError as error:
        return repr(error)
    return "" if got == sent else "other bytes than were sent"


def attempt(source: Host, destination: Host, family: int, timeout: float = 2.0) -> str:
    """A new connection and an exchange on it: '' or what went wrong."""
    try:
        with source.connect(destination.address(family), PORT, timeout) as sock:
            return ping(sock)
    except OSError as error:
        return type(error).__name__


def opened(relay: RelayProcess) -> int:
    """How many connections the relay has taken so far."""
    return sum(line["message"] == "connection open" for line in relay.lines())


def processes(lab: Lab, word: str) -> list[int]:
    """The processes in the relay's host that have this in their command line."""
    network = os.readlink(f"/proc/{lab.relay.pid}/ns/net")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "ns/net") == network and word in (folder / "cmdline").read_text().replace(
                "\0", " "
            ):
                found.append(int(folder.name))
    return found
