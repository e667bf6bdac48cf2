"""The network fails: hosts that vanish, packets that are lost, servers that are not there."""

import hashlib
import socket
import threading
import time

import pytest
from exchanges import PATIENCE, Ends, Exchange, data, play, read_to_end, see_reset
from relay_fixtures import intercepting_relay
from rows import Seen

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

PORT = 8000
TRIES = 5
"""Times that something quick is measured: the best of them counts, for the machine may be busy."""


@pytest.fixture
def steered(fresh_lab: Lab) -> Lab:
    fresh_lab.intercept((PORT, PORT + 1))
    return fresh_lab


def opened(relay: RelayProcess, ends: Ends) -> None:
    """This conversation is the relay's."""
    client = str(from_sockaddr(ends.name))
    relay.wait_for_line(lambda line: line["message"] == "connection open" and line["client"] == client)


def seconds_until_reset(sock: socket.socket) -> float:
    """From now until reading fails so."""
    began = time.monotonic()
    sock.settimeout(PATIENCE)
    with pytest.raises(ConnectionResetError):
        while sock.recv(65536):
            pass
    return time.monotonic() - began


# --- hosts that vanish

VIGILANT = ("--user-timeout", "5", "--keepalive", "3")


@pytest.mark.slow
@pytest.mark.row(
    "F9", "the server's host vanishes; user-timeout 5, keepalive 3", "busy and idle client reset, after 4 to 6.5 s"
)
def test_a_server_host_that_vanishes_is_noticed(steered: Lab, seen: Seen) -> None:
    lab = steered
    with lab.relay_process(*VIGILANT) as relay:
        idle, busy = Ends(lab, socket.AF_INET, PORT), Ends(lab, socket.AF_INET, PORT + 1)
        for ends in (idle, busy):
            opened(relay, ends)
        lab.server.run(["ip", "link", "set", "sr", "down"])
        busy.client.sendall(b"x" * 1000)
        took = both_times(idle.client, busy.client)
        records = [relay.record_of(ends.client) for ends in (idle, busy)]
        assert {record["outcome"] for record in records} == {"upstream-reset"}
        assert all(4 <= seconds <= 6.5 for seconds in took), took
        seen(f"reset after {took[0]:.1f} and {took[1]:.1f} s")
        for ends in (idle, busy):
            ends.close()


@pytest.mark.slow
@pytest.mark.row(
    "F10", "the client's host vanishes; user-timeout 5, keepalive 3", "server reset after 4 to 6.5 s; nothing left"
)
def test_a_client_host_that_vanishes_is_noticed(steered: Lab, seen: Seen) -> None:
    lab = steered
    with lab.relay_process(*VIGILANT) as relay:
        idle, busy = Ends(lab, socket.AF_INET, PORT), Ends(lab, socket.AF_INET, PORT + 1)
        for ends in (idle, busy):
            opened(relay, ends)
        lab.client.run(["ip", "link", "set", "cr", "down"])
        busy.server.sendall(b"x" * 1000)
        took = both_times(idle.server, busy.server)
        records = [relay.record_of(ends.client) for ends in (idle, busy)]
        assert {record["outcome"] for record in records} == {"client-reset"}
        assert all(4 <= seconds <= 6.5 for seconds in took), took
        seen(f"reset after {took[0]:.1f} and {took[1]:.1f} s; both recorded")
        for ends in (idle, busy):
            ends.close()


def both_times(*socks: socket.socket) -> list[float]:
    """The seconds until each of them is reset, all from now."""
    took: list[float] = []
    threads = [threading.Thread(target=lambda sock=sock: took.append(seconds_until_reset(sock))) for sock in socks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    assert len(took) == len(socks)
    return took


# --- packets that are lost

LOSSY = """
table inet lossy {
    chain prerouting {
        type filter hook prerouting priority -400; policy accept;
        numgen random mod 100 < 5 counter drop
    }
}
"""
MANY = 20_000_000


@pytest.mark.slow
@pytest.mark.row("F12", "5 % of all packets are lost, both ways", "20 MB whole, no reset")
def test_lost_packets_are_no_matter(steered: Lab, seen: Seen) -> None:
    lab = steered

    def sends(sock: socket.socket) -> list[object]:
        sock.settimeout(90)
        sock.sendall(data(MANY))
        sock.shutdown(socket.SHUT_WR)
        return read_to_end(sock)

    def reads(sock: socket.socket) -> list[object]:
        sock.settimeout(90)
        saw = read_to_end(sock)
        sock.close()
        return saw

    with lab.relay_process() as relay:
        ends = Ends(lab, socket.AF_INET, PORT)
        opened(relay, ends)
        lab.relay.run(["nft", "-f", "-"], input=LOSSY)
        saw = play(Exchange("lossy", sends, reads), ends.client, ends.server)
        counted = lab.relay.run(["nft", "list", "table", "inet", "lossy"]).stdout
        assert "packets 0 " not in counted, "nothing was lost"
        assert saw["server"] == [MANY, hashlib.sha256(data(MANY)).hexdigest(), "EOF"]
        assert saw["client"][0::2] == [0, "EOF"]
        assert relay.record_of(ends.client)["outcome"] == "completed"
        ends.close()
    seen("20 MB, the same hash, completed")


# --- servers that are not there


relay = intercepting_relay(("8000-8099",), "--connect-timeout", "3", scope="module")


def check_reset(lab: Lab, relay: RelayProcess, address: str, port: int, outcome: str, most: float) -> float:
    """The client is reset, in time in the best of some tries; and the record says why."""
    took = []
    for _ in range(TRIES):
        client, seconds = see_reset(lab.client, address, port)
        with client:
            assert relay.record_of(client)["outcome"] == outcome
        took.append(seconds)
        if seconds <= most:
            break
    assert min(took) <= most, took
    return min(took)


@pytest.mark.row("F14", "nobody listens at the server", "connected, then ECONNRESET within 50 ms; connect-refused")
def test_a_server_that_refuses(lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    check_reset(lab, relay, lab.server.ipv4, 8001, "connect-refused", 0.05)
    check_reset(lab, relay, lab.server.ipv6, 8001, "connect-refused", 0.05)
    seen("ECONNRESET within 50 ms, connect-refused")


@pytest.mark.row("F15", "no route to the server", "ECONNRESET within 50 ms; connect-unreachable")
def test_a_server_without_a_route(lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    lab.relay.run(["ip", "route", "add", "unreachable", "192.0.2.1/32"])
    check_reset(lab, relay, "192.0.2.1", PORT, "connect-unreachable", 0.05)
    seen("ECONNRESET within 50 ms, connect-unreachable")


@pytest.mark.slow
@pytest.mark.row("F13", "the SYN to the server is dropped; connect-timeout 3", "reset at 3 s +-0.5; connect-timeout")
def test_a_server_that_does_not_answer(lab: Lab, relay: RelayProcess, seen: Seen) -> None:
    lab.server.run(["nft", "-f", "-"], input=DROPPED)
    took = check_reset(lab, relay, lab.server.ipv4, 8005, "connect-timeout", 3.5)
    assert took >= 2.5
    seen(f"reset after {took:.1f} s, connect-timeout")


DROPPED = """
table inet dropping {
    chain input { type filter hook input priority 0; policy accept; tcp dport 8005 drop; }
}
"""


@pytest.mark.row("F20", "10 local ports, 20 connections to one server", "10 served, 10 reset; no-local-port")
def test_local_ports_run_out(fresh_lab: Lab, seen: Seen) -> None:
    lab = fresh_lab
    lab.relay.set_sysctl("net.ipv4.ip_local_port_range", "40000 40009")
    lab.intercept((PORT,))
    with lab.relay_process() as relay, lab.server.listen(PORT) as listener:
        listener.settimeout(PATIENCE)
        served, refused = [], 0
        for _ in range(20):
            client = lab.client.connect(lab.server.ipv4, PORT) if len(served) < 10 else None
            if client is None:
                client, _ = see_reset(lab.client, lab.server.ipv4, PORT)
                refused += relay.record_of(client)["outcome"] == "no-local-port"
                client.close()
                continue
            server, peer = listener.accept()
            assert 40000 <= peer[1] <= 40009 and peer[0] == lab.relay_address()
            served.append((client, server))
        assert (len(served), refused) == (10, 10)
        for client, server in served:
            server.sendall(b"!")
            assert client.recv(1) == b"!"
            client.close()
            server.close()
    seen("10 served, 10 reset: no-local-port")
