"""Peers that do what is allowed and rarely done: the same port again at once, urgent bytes, no byte at all."""

import socket
import time
from collections import Counter

import pytest
from deadlines import wait_until
from exchanges import PATIENCE, reset
from rows import Seen

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

PORT, AGAIN = 8000, 4
FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
CLOSERS = ("server", "client", "reset")


@pytest.mark.parametrize("closer", CLOSERS)
@pytest.mark.row("F19", "the same port of a client again at once, preserve-source full", "4 of 4 served, no EADDRINUSE")
def test_the_same_port_again(fresh_lab: Lab, closer: str, seen: Seen) -> None:
    lab = fresh_lab
    lab.intercept((PORT,), preserve_source=True)
    with lab.relay_process("--preserve-source", "full") as relay, lab.server.listen(PORT) as listener:
        listener.settimeout(PATIENCE)
        for number in range(1, AGAIN + 1):
            client = lab.client.socket()
            client.settimeout(PATIENCE)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((lab.client.ipv4, 45678))
            dial_again(client, (lab.server.ipv4, PORT))
            server, peer = listener.accept()
            assert peer[0] == lab.client.ipv4, "the address was not preserved"
            server.sendall(b"!")
            assert client.recv(1) == b"!"
            end(closer, client, server)
            wait_for_records(relay, number)
        outcomes = Counter(record["outcome"] for record in relay.records())
    assert sum(outcomes.values()) == AGAIN
    assert set(outcomes) == ({"client-reset"} if closer == "reset" else {"completed"})
    lab.stop_intercepting()
    seen(f"{AGAIN} of {AGAIN}: {closer} ends it" if closer == "reset" else f"{AGAIN} of {AGAIN}: {closer} closes first")


def dial_again(client: socket.socket, address: tuple[str, int]) -> None:
    """Until the client's own kernel has let go of the connection before (TIME_WAIT, EADDRNOTAVAIL)."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return client.connect(address)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def end(closer: str, client: socket.socket, server: socket.socket) -> None:
    """Both are closed in the end."""
    if closer == "reset":
        reset(client)
        server.close()
        return
    first, second = (server, client) if closer == "server" else (client, server)
    first.shutdown(socket.SHUT_WR)
    assert second.recv(1) == b""
    second.close()
    assert first.recv(1) == b""
    first.close()


def wait_for_records(relay: RelayProcess, count: int) -> None:
    wait_until(lambda: len(relay.records()) >= count, f"{count} records")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.row(
    "F21", "no byte, at once closed, at once reset, urgent bytes: 50 of each", "no traceback, counters right"
)
def test_short_lives(lab: Lab, family: int, seen: Seen) -> None:
    lab.intercept((PORT,))
    address = (lab.server.address(family), PORT)
    with lab.relay_process() as relay, lab.server.listen(PORT, family, backlog=512) as listener:
        names = Counter()
        for number in range(200):
            client = lab.client.socket(family)
            client.settimeout(PATIENCE)
            client.connect(address)
            names[str(from_sockaddr(client.getsockname()))] += 1
            if number % 4 == 1:
                reset(client)
            elif number % 4 == 2:
                client.send(b"!", socket.MSG_OOB)
                client.send(b"")
            elif number % 4 == 3:
                client.send(b"!", socket.MSG_OOB)
                reset(client)
            client.close()
            listener.settimeout(0)
            take_all(listener)

        def all_recorded() -> bool:
            take_all(listener)
            return len(relay.records()) >= 200

        wait_until(all_recorded, "200 records")
        assert {record["client"] for record in relay.records()} <= set(names), "records of nobody"
        relay.stop()
        stopped = relay.wait_for_line(lambda line: line["message"] == "stopped")
        levels = Counter(line["levelname"] for line in relay.lines() if line["message"] != "connection closed")
    assert stopped["accepted"] == sum(stopped["closed"].values()) == 200 and stopped["live"] == 0
    assert not levels["ERROR"] and not levels["CRITICAL"] and "Traceback" not in relay.log
    lab.stop_intercepting()
    seen("accepted 200 = closed 200, nothing above a warning")


def take_all(listener: socket.socket) -> None:
    """Accept and close whoever has come."""
    while True:
        try:
            server, _ = listener.accept()
        except BlockingIOError:
            return
        server.close()
