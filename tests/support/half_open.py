"""Handshakes that nobody ends: SYNs from addresses that answer nothing, as a flood has them."""

import array
import socket
import struct

from deadlines import PATIENCE
from interception import PORT

from tproxy_relay.lab import Host, Lab

SOURCES = {socket.AF_INET: "10.99.0.0/16", socket.AF_INET6: "fd99::/112"}
"""Where they come from: the client's host is the way there, and nobody is at home."""
_PER_SOURCE = 60
_SYN = 0x02


def lead_to_nobody(lab: Lab) -> None:
    """Make it so, for answers of the relay's host and of the server."""
    for family, network in SOURCES.items():
        for host in (lab.relay, lab.server):
            by = lab.client.address(family) if host is lab.relay else lab.relay_address(family)
            host.run(["ip", "route", "add", network, "via", by])
    drop = "table inet quiet { chain forward { type filter hook forward priority 0; policy drop; }; }"
    lab.client.run(["nft", "-f", "-"], input=drop)


def half_open(lab: Lab, address: str, count: int, port: int = PORT) -> None:
    """So many SYNs from the client's host, each from another address and port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    there = socket.inet_pton(family, address)
    with lab.client.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        for number in range(count):
            raw.sendto(_syn(family, _source(family, number), there, 20_000 + number % _PER_SOURCE, port), (address, 0))


def _source(family: int, number: int) -> bytes:
    host = 1 + number // _PER_SOURCE
    if family == socket.AF_INET:
        return socket.inet_pton(family, f"10.99.{host // 250}.{1 + host % 250}")
    return socket.inet_pton(family, f"fd99::{host:x}")


def _syn(family: int, here: bytes, there: bytes, sport: int, dport: int) -> bytes:
    """RFC 9293, 3.1; with the largest segments of an Ethernet."""
    length = 24
    tcp = struct.pack("!HHIIBBHHHBBH", sport, dport, 1, 0, length // 4 << 4, _SYN, 64240, 0, 0, 2, 4, 1440)
    pseudo = here + there + struct.pack("!II", length, socket.IPPROTO_TCP)
    tcp = tcp[:16] + _checksum(pseudo + tcp) + tcp[18:]
    if family == socket.AF_INET:
        # The kernel fills in length, identification and checksum (raw(7)).
        return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 0, 0, 0x4000, 64, socket.IPPROTO_TCP, 0, here, there) + tcp
    return struct.pack("!IHBB16s16s", 6 << 28, length, socket.IPPROTO_TCP, 64, here, there) + tcp


def _checksum(data: bytes) -> bytes:
    words = array.array("H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("=H", ~total & 0xFFFF)


def cookies(host: Host) -> tuple[int, int]:
    """SYN cookies that this host has sent, and those that came back (/proc/net/netstat)."""
    names, values = (line.split() for line in host.run(["grep", "^TcpExt", "/proc/net/netstat"]).stdout.splitlines())
    counted = dict(zip(names, values))
    return int(counted["SyncookiesSent"]), int(counted["SyncookiesRecv"])


def served(source: Host, destination: Host, family: int, count: int = 10) -> list[str]:
    """What so many clients saw, one after the other: 'served', or the name of what they got."""
    saw = []
    for _ in range(count):
        try:
            with source.connect(destination.address(family), PORT, PATIENCE) as sock:
                sock.sendall(b"?")
                saw.append("served" if sock.recv(1) == b"?" else "EOF")
        except OSError as error:
            saw.append(type(error).__name__)
    return saw
