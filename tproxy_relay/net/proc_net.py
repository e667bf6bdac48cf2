"""What the kernel tells of this network namespace in /proc/net: its TCP sockets, and what its backlogs have lost."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

_LISTEN = "0A"
"""net/tcp_states.h, TCP_LISTEN, as /proc/net/tcp writes it."""


_SYN_RECV = "03"
"""The same of TCP_NEW_SYN_RECV, which is shown as TCP_SYN_RECV."""


class TcpSocket(NamedTuple):
    """A TCP socket, whoever's it is."""

    local_port: int
    remote_port: int
    """0 for one that listens."""
    listening: bool
    inode: str
    """By which /proc/PID/fd knows it; `0` when no process has it any more."""


def tcp_sockets() -> Iterator[TcpSocket]:
    """The TCP sockets of this network namespace (proc(5), /proc/net/tcp, tcp6); none of a family that is not here."""
    for table in ("tcp", "tcp6"):
        for line in _lines(table):
            fields = line.split()
            if len(fields) < 10 or ":" not in fields[1]:
                continue  # the title
            local, remote = (int(field.rsplit(":", 1)[1], 16) for field in fields[1:3])
            yield TcpSocket(local, remote, fields[3] == _LISTEN, fields[9])


def half_open() -> bool:
    """True if some client's SYN has come to a listener of this network namespace, and its handshake is under way."""
    return any(
        fields[3] == _SYN_RECV
        for table in ("tcp", "tcp6")
        for fields in map(str.split, _lines(table))
        if len(fields) >= 10
    )


def listening_ports() -> set[int]:
    """The TCP ports on which somebody listens in this network namespace."""
    return {one.local_port for one in tcp_sockets() if one.listening}


def listen_overflows() -> int:
    """How often a connection was lost in this network namespace because the backlog of its listener was full, whoever's
    (TcpExtListenOverflows of nstat(8); proc(5), /proc/net/netstat). 0 where the kernel does not tell."""
    return _tcp_ext("ListenOverflows")


_OF_UNFINISHED = ("EmbryonicRsts", "TCPSynRetrans", "ListenDrops", "SyncookiesSent")


def unfinished() -> int | None:
    """Traces that handshakes have left in this network namespace which came to a listener and were not finished,
    whoever's, since it began: the client took it back, an answer was sent again or could not be sent, or there was no
    room (TcpExt of nstat(8): EmbryonicRsts, TCPSynRetrans, ListenDrops, SyncookiesSent). None where the kernel does not
    tell."""
    found = [_tcp_ext(name, -1) for name in _OF_UNFINISHED]
    return None if -1 in found else sum(found)


def _tcp_ext(name: str, unknown: int = 0) -> int:
    try:
        names, numbers = (line.split() for line in _lines("netstat") if line.startswith("TcpExt:"))
        return int(numbers[names.index(name)])
    except ValueError:
        return unknown


def _lines(table: str) -> Iterator[str]:
    """One after the other: a host may have hundreds of thousands of sockets. None where there is no such table."""
    with contextlib.suppress(OSError), open(f"/proc/net/{table}", encoding="ascii", errors="replace") as lines:
        yield from lines
