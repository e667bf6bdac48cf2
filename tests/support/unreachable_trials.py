"""What a client sees when a router, or a host on the way, says that the server cannot be reached."""

import errno
import socket
import time
from typing import NamedTuple

from interception import PORT

from tproxy_relay.lab import Host
from tproxy_relay.net.endpoint import from_sockaddr

KINDS = {
    "net": ("net-unreachable", "no-route"),
    "host": ("host-unreachable", "addr-unreachable"),
    "protocol": ("prot-unreachable", "policy-fail"),
    "port": ("port-unreachable", "port-unreachable"),
    "net prohibited": ("net-prohibited", "reject-route"),
    "host prohibited": ("host-prohibited", "admin-prohibited"),
    "prohibited": ("admin-prohibited", "admin-prohibited"),
}
"""What is said, in nft's words, by IPv4 and by IPv6 (RFC 792, RFC 4443)."""
PORTS = {name: PORT + 1 + number for number, name in enumerate([*KINDS, "too many hops"])}
"""Where clients must connect to be told so."""


class Answer(NamedTuple):
    """The client's address, a short phrase, and seconds."""

    client: str
    saw: str
    seconds: float


def refuse(router: Host) -> None:
    """Have this router refuse what goes to PORTS, to each in its own words."""
    lines = []
    for name, words in KINDS.items():
        for version, icmp, word in ((4, "icmp", words[0]), (6, "icmpv6", words[1])):
            match = f"meta nfproto ipv{version} tcp dport {PORTS[name]}"
            lines.append(f"    {match} reject with {icmp} type {word}")
    last = f"tcp dport {PORTS['too many hops']}"
    rules = [
        "table inet refuse {",
        "  chain forward {\n    type filter hook forward priority 0;",
        *lines,
        "  }\n  chain early {\n    type filter hook prerouting priority -150;",
        f"    {last} ip ttl set 1",
        f"    {last} ip6 hoplimit set 1",
        "  }\n}",
    ]
    router.run(["nft", "-f", "-"], input="\n".join([*rules, ""]))


def ask(source: Host, address: str, port: int, patience: float, source_port: int = 0) -> Answer:
    """Connect, and wait for the end of it: what connect() says, or 'connected' and what recv() says."""
    began, saw = time.monotonic(), ""
    with source.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        if source_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", source_port))
        sock.settimeout(patience)
        try:
            sock.connect((address, port))
            saw = "connected, "
            saw += "data" if sock.recv(1) else "EOF"
        except TimeoutError:
            saw += "no answer"
        except OSError as error:
            saw += errno.errorcode[error.errno or 0]
        return Answer(str(from_sockaddr(sock.getsockname())), saw, time.monotonic() - began)
