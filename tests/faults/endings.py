"""How connections end, seen from both ends: directly, through the relay, and through HAProxy.

    python tests/faults/endings.py [--keep]

Prints the table of what each end saw. --keep writes docs/endings.csv, which the manual shows. The conversations are
those of tests/support/exchanges.py, and some that have no two ends: a server that refuses, and a relay that is killed.
"""

import contextlib
import csv
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "support"), str(Path(__file__).parents[2])]

import haproxy
from exchanges import EXCHANGES, PATIENCE, Ends, Exchange, Saw, data, play, read_exactly, read_to_end

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

KEPT = Path(__file__).parents[2] / "docs" / "endings.csv"
DIRECT, INTERCEPTED = 9000, 8000
"""Ports of the server: the rules steer the second to the relay."""
NO_RELAY = "(there is none)"

Table = dict[str, dict[str, str]]
"""What the ends saw: by case, then by way."""


class NotInterceptedError(Exception):
    """The connection went past the relay: what its ends saw says nothing."""


# --- the ways


@contextlib.contextmanager
def direct(lab: Lab) -> Iterator[Callable[[Ends], None]]:
    """No relay; the check that it is so."""

    def check(ends: Ends) -> None:
        if ends.seen[:2] != ends.name[:2]:
            raise NotInterceptedError("the direct connection was intercepted")

    yield check


@contextlib.contextmanager
def ours(lab: Lab) -> Iterator[Callable[[Ends], None]]:
    """Through the relay, whose records show it."""
    with intercepting(lab), lab.relay_process() as relay:

        def check(ends: Ends) -> None:
            client = str(from_sockaddr(ends.name))
            relay.wait_for_record(lambda line: line["client"] == client)

        yield check


@contextlib.contextmanager
def through_haproxy(lab: Lab) -> Iterator[Callable[[Ends], None]]:
    """Through HAProxy: nothing else would show the relay's address to the server."""
    with intercepting(lab), haproxy.running(lab):

        def check(ends: Ends) -> None:
            if ends.seen[0] != lab.relay_address(socket.AF_INET if len(ends.name) == 2 else socket.AF_INET6):
                raise NotInterceptedError("the server saw somebody else than HAProxy")

        yield check


WAYS = {"direct": direct, "tproxy-relay": ours, "HAProxy": through_haproxy}


@contextlib.contextmanager
def intercepting(lab: Lab) -> Iterator[None]:
    """With the rules."""
    lab.intercept((INTERCEPTED,))
    try:
        yield
    finally:
        lab.stop_intercepting()


# --- the cases


def table(lab: Lab) -> Table:
    """All cases, all ways."""
    by_way = {way: on_the_way(lab, way) for way in WAYS}
    found: Table = {case: {way: by_way[way][case] for way in WAYS} for case in by_way["direct"]}
    found["the relay is killed in mid-transfer"] = killed(lab)
    return found


def on_the_way(lab: Lab, way: str) -> dict[str, str]:
    """All cases but those that kill the relay: what the ends saw, by case."""
    port = DIRECT if way == "direct" else INTERCEPTED
    with WAYS[way](lab) as check:
        found = {exchange.name: played(lab, port, exchange, check) for exchange in EXCHANGES}
        found["the server refuses"] = refused(lab, port)
    return found


def played(lab: Lab, port: int, exchange: Exchange, check: Callable[[Ends], None]) -> str:
    """What both ends saw of it."""
    ends = Ends(lab, socket.AF_INET, port, exchange)
    try:
        saw = play(exchange, ends.client, ends.server)
    finally:
        ends.close()
    check(ends)
    return both(saw["client"], saw["server"])


def both(client: Saw, server: Saw) -> str:
    return f"client: {words(client)}; server: {words(server)}"


def words(saw: Saw) -> str:
    """What an end saw, to be read."""
    parts: list[str] = []
    for part in saw:
        if isinstance(part, int):
            parts.append(f"{part:,} bytes")
        elif isinstance(part, bytes):
            parts.append(f"{len(part):,} bytes")
        elif not re.fullmatch("[0-9a-f]{64}", str(part)):
            parts.append(str(part))
    return ", ".join(parts) or "-"


def refused(lab: Lab, port: int) -> str:
    """Nobody listens there."""
    with lab.client.socket() as client:
        client.settimeout(PATIENCE)
        try:
            client.connect((lab.server.ipv4, port))
        except ConnectionRefusedError:
            return "client: connect() refused"
        except ConnectionResetError:  # sooner than connect() returned
            return "client: connected, then ECONNRESET"
        saw = read_to_end(client)
        return f"client: connected, then {saw[-1]}"


def killed(lab: Lab) -> dict[str, str]:
    """What both ends see of kill -9."""
    found = {"direct": NO_RELAY}
    with intercepting(lab):
        with lab.relay_process() as relay:
            found["tproxy-relay"] = killed_with(lab, lambda: kill_ours(relay))
        with haproxy.running(lab) as pid:
            found["HAProxy"] = killed_with(lab, lambda: os.kill(pid, signal.SIGKILL))
    return found


def kill_ours(relay: RelayProcess) -> None:
    relay.wait_for_line(lambda line: line["message"] == "connection open")
    os.kill(relay.pid, signal.SIGKILL)


def killed_with(lab: Lab, kill: Callable[[], None]) -> str:
    """Both ends have sent a part of what they had to say."""
    ends = Ends(lab, socket.AF_INET, INTERCEPTED)
    try:
        if ends.seen[0] != lab.relay_address():
            raise NotInterceptedError("the server saw the client")
        for one, other in ((ends.client, ends.server), (ends.server, ends.client)):
            one.settimeout(PATIENCE)
            other.settimeout(PATIENCE)
            one.sendall(data(1000))
            assert read_exactly(other, 1000) == data(1000)
        kill()
        return f"client: {read_to_end(ends.client)[-1]}; server: {read_to_end(ends.server)[-1]}"
    finally:
        ends.close()


# --- the command


def rows(found: Table) -> list[list[str]]:
    """With a head."""
    body = [[case, *(seen.get(way, "") for way in WAYS)] for case, seen in found.items()]
    return [["what happens", *WAYS], *body]


def main(arguments: list[str]) -> int:
    """Play, print, keep."""
    with Lab() as lab:
        lines = rows(table(lab))
    for line in lines:
        print(" | ".join(line))
    different = [line[0] for line in lines[1:] if line[1] not in (line[2], NO_RELAY)]
    print(f"{len(lines) - 1} cases; not as directly: {', '.join(different) or 'none'}")
    if "--keep" in arguments:
        with KEPT.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
