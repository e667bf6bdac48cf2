"""What a client and the server see while the relay's host changes: interfaces that go and come, IPv6 that comes late.

Each trial works with a relay and without one, for the table of what is direct and what is relayed.
"""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

from deadlines import wait_until
from interception import FAMILIES, PORT, ping

from tproxy_relay.lab import Host, Lab
from tproxy_relay.net import endpoint

TRY_TIMEOUT = 0.3
"""Seconds for one attempt; the next one is a new SYN."""

CLIENT_LINK = """\
link add rc type veth peer name cr netns {client}
addr add 10.81.1.1/24 dev rc
addr add fd81:1::1/64 dev rc nodad
link set rc up
"""
CLIENT_END = """\
addr add 10.81.1.2/24 dev cr
addr add fd81:1::2/64 dev cr nodad
link set cr up
route add default via 10.81.1.1
route add ::/0 via fd81:1::1
"""
RENAME = """\
link set {former} down
link set {former} name {name}
link set {name} up
addr replace fd81:1::1/64 dev {name} nodad
"""
IPV6_ADDRESSES = """\
addr add fd81:1::1/64 dev rc nodad
addr add fd81:2::1/64 dev rs nodad
"""
DIRECT, RELAYED = "direct", "relayed"


def unplug(lab: Lab) -> None:
    """Delete the interface on the client's side, as pppd or wg-quick does."""
    lab.relay.run(["ip", "link", "del", "rc"])


def plug(lab: Lab) -> None:
    """Make it again, with the same name and addresses, and another number."""
    lab.relay.run(["ip", "-batch", "-"], input=CLIENT_LINK.format(client=lab.client.pid))
    lab.client.run(["ip", "-batch", "-"], input=CLIENT_END)


def rename(lab: Lab, former: str, name: str) -> None:
    """Give an interface of the relay's host another name; its IPv6 addresses do not outlive that it is down."""
    lab.relay.run(["ip", "-batch", "-"], input=RENAME.format(former=former, name=name))


def one_connection(client: Host, server: Host, family: int, timeout: float = TRY_TIMEOUT) -> str:
    """How the server saw a new connection: `direct` or `relayed`; or the name of the client's error. The server of
    `PeerServer` sends first whom it sees."""
    try:
        with client.connect(server.address(family), PORT, timeout) as sock:
            seen = sock.recv(64).decode().strip()
            own = str(endpoint.from_sockaddr(sock.getsockname()))
    except OSError as error:
        return type(error).__name__
    if not seen:
        return "EOF"
    return DIRECT if seen == own else RELAYED


class PeerServer:
    """Tells each client the address and port that it has, then sends back what it gets."""

    def __init__(self, host: Host) -> None:
        self._listeners = [host.listen(PORT, family) for family in FAMILIES.values()]
        self._live: list[socket.socket] = []
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                sock, peer = listener.accept()
                self._live.append(sock)
                seen = str(endpoint.from_sockaddr(peer))
                threading.Thread(target=self._serve, args=(sock, seen), daemon=True).start()

    def _serve(self, sock: socket.socket, peer: str) -> None:
        with sock, contextlib.suppress(OSError):
            sock.sendall(peer.ljust(64).encode())
            while data := sock.recv(65536):
                sock.sendall(data)

    def __enter__(self) -> "PeerServer":
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (*self._listeners, *self._live):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@dataclass
class Knocker:
    """Connects again and again, and notes how it went and when (time.monotonic()). Use it in a `with`."""

    client: Host
    server: Host
    family: int
    seen: list[tuple[float, str]] = field(default_factory=list)

    def __enter__(self) -> "Knocker":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self.seen.append((began, one_connection(self.client, self.server, self.family)))
            self._stop.wait(0.02)

    def answers(self) -> set[str]:
        """The kinds of what has come out so far."""
        return {answer for _, answer in self.seen}

    def first_relayed(self, since: float) -> float:
        """Seconds from `since` to the first connection that was begun after it and relayed."""
        found: list[float] = []

        def relayed() -> bool:
            found.extend(at for at, answer in list(self.seen) if at >= since and answer == RELAYED)
            return bool(found)

        wait_until(relayed, "a client is relayed")
        return found[0] - since


def long_session(lab: Lab, family: int) -> socket.socket:
    """A connection of the client to the server, which is served."""
    sock = lab.client.connect(lab.server.address(family), PORT)
    sock.settimeout(20)
    seen = b""
    while len(seen) < 64:
        seen += sock.recv(64 - len(seen))
    assert ping(sock) == ""
    return sock


def switch_ipv6(lab: Lab, on: bool) -> None:
    """Of the relay's host, as sysctl does it; with it come and go its addresses."""
    for scope in ("all", "default"):
        lab.relay.set_sysctl(f"net.ipv6.conf.{scope}.disable_ipv6", 0 if on else 1)
    if on:
        lab.relay.run(["ip", "-batch", "-"], input=IPV6_ADDRESSES)
