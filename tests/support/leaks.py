"""What a test may leave behind: threads, descriptors, child processes, and things of the host's own network.

A look takes about half a millisecond. Where it finds more than before, there is time for what is just ending, and for
garbage to be collected; what is there then is left behind. Rules of iptables-legacy are not looked for: the kernel
has no cheap way to ask.
"""

import contextlib
import gc
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PATIENCE = 10.0
"""Seconds."""

_HEADER = struct.Struct("=IHHII")
"""linux/netlink.h: struct nlmsghdr."""
_REQUEST_DUMP = 0x301
_NETLINK_ERROR, _NETLINK_DONE = 2, 3
_NETLINK_NETFILTER = 12
_GET_RULES = 34
"""linux/rtnetlink.h: RTM_GETRULE."""
_GET_CHAINS = 10 << 8 | 4
"""linux/netfilter/nfnetlink.h and nf_tables.h: NFNL_SUBSYS_NFTABLES, NFT_MSG_GETCHAIN."""
_OURS = b"tproxy"
"""In the names of our tables and chains, in small letters. Other chains are other people's."""


@dataclass(frozen=True)
class Held:
    """What there is at one moment."""

    threads: frozenset[threading.Thread]
    descriptors: frozenset[str]
    children: frozenset[str]
    namespaces: frozenset[str]
    rules: frozenset[bytes]
    chains: frozenset[bytes]

    def beyond(self, before: "Held") -> list[str]:
        """What was not there before, in words."""
        found = []
        for field in fields(self):
            more: frozenset[Any] = getattr(self, field.name) - getattr(before, field.name)
            if field.name == "descriptors" and len(self.descriptors) <= len(before.descriptors):
                continue  # another number for the same thing
            found += [f"{field.name}: {_named(field.name, one)}" for one in more]
        return sorted(found)


class Host:
    """The network that the tests run in, and the process that runs them."""

    def __init__(self) -> None:
        # A netlink socket stays in the namespace that it was made in.
        self._route = _netlink(socket.NETLINK_ROUTE)
        self._netfilter = _netlink(_NETLINK_NETFILTER)

    def close(self) -> None:
        """Ask no more."""
        for sock in (self._route, self._netfilter):
            if sock is not None:
                sock.close()

    def look(self) -> Held:
        """Everything there is."""
        return Held(
            frozenset(threading.enumerate()),
            frozenset(_descriptors()),
            frozenset(_children()),
            frozenset(_names("/run/netns")),
            frozenset(_dump(self._route, _GET_RULES, bytes(12))),
            # struct nfgenmsg in front has the number of the last change of anything.
            frozenset(one for one in _dump(self._netfilter, _GET_CHAINS, bytes(4), skip=4) if _OURS in one.lower()),
        )

    def left_since(self, before: Held) -> list[str]:
        """What is there beyond that, and stays."""
        deadline = time.monotonic() + PATIENCE
        while more := self.look().beyond(before):
            if time.monotonic() > deadline:
                return more
            gc.collect()
            time.sleep(0.01)
        return []


def _descriptors() -> list[str]:
    return [one for one in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{one}")]  # not the list's own


def _children() -> list[str]:
    """Process ids of our children, dead ones included that nobody has waited for (proc(5))."""
    found: list[str] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended, or the kernel was made without CONFIG_PROC_CHILDREN
            found += Path(f"/proc/self/task/{task}/children").read_text().split()
    return found


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _named(kind: str, one: Any) -> str:
    if kind == "threads":
        return str(one.name)
    if kind == "rules" or kind == "chains":
        return repr(bytes(one))
    path = {"descriptors": f"/proc/self/fd/{one}", "children": f"/proc/{one}/cmdline"}.get(kind, "")
    with contextlib.suppress(OSError):
        if kind == "descriptors":
            return f"{one} -> {os.readlink(path)}"
        if kind == "children":
            return f"{one} {Path(path).read_text().split(chr(0))}"
    return str(one)


def _netlink(protocol: int) -> socket.socket | None:
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    except OSError:
        return None
    sock.settimeout(PATIENCE)
    return sock


def _dump(sock: socket.socket | None, kind: int, payload: bytes, *, skip: int = 0) -> list[bytes]:
    """The objects of that kind, without so many bytes in front; none for users who may neither see nor change them."""
    if sock is None:
        return []
    sock.send(_HEADER.pack(_HEADER.size + len(payload), kind, _REQUEST_DUMP, 0, 0) + payload)
    found: list[bytes] = []
    while True:
        answer = memoryview(sock.recv(1 << 16))
        while answer:
            length, what, _, _, _ = _HEADER.unpack_from(answer)
            if what in (_NETLINK_DONE, _NETLINK_ERROR):
                return found
            found.append(bytes(answer[_HEADER.size + skip : length]))
            answer = answer[length + 3 & ~3 :]
