"""Clients whose address and port the relay borrows, where that is not simple."""

import re
import socket

import pytest
from exchanges import data, read_to_end, reset
from interception import EchoServer, ping

from tproxy_relay.lab import Host, Lab

PORT = 8000


def test_a_client_that_comes_back_from_the_same_port_is_no_loop(lab: Lab) -> None:
    """Its first connection is over, but the slow server is still being given what came before the reset."""
    lab.intercept((PORT,), preserve_source=True)
    with lab.relay_process("--preserve-source", "full") as relay, lab.server.listen(PORT) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.settimeout(10)
        first = dial_from(lab, 40001)
        slow, _ = listener.accept()
        first.sendall(data(300_000))
        reset(first)
        second = dial_from(lab, 40001)
        server, peer = listener.accept()
        assert peer[0] == lab.client.ipv4
        server.sendall(b"welcome back")
        assert second.recv(100) == b"welcome back"
        slow.settimeout(10)
        assert read_to_end(slow)[-1] == "ECONNRESET"
        second.close()
        server.close()
        slow.close()
        outcomes = [
            relay.wait_for_record(lambda line, o=o: line["outcome"] == o) for o in ("client-reset", "completed")
        ]
        assert [record["orig_dst"] for record in outcomes] == [f"{lab.server.ipv4}:{PORT}"] * 2
    lab.stop_intercepting()


def test_a_client_from_a_low_port_keeps_its_address(lab: Lab) -> None:
    """Binding to a port below 1024 takes another capability than the one that we ask for."""
    lab.intercept((PORT,), preserve_source=True)
    net_raw = ("setpriv", "--bounding-set=-all,+net_raw", "--inh-caps=-all,+net_raw", "--no-new-privs")
    with (
        lab.relay_process("--preserve-source", "full", wrapper=net_raw) as relay,
        lab.server.listen(PORT) as listener,
    ):
        lab.client.set_sysctl("net.ipv4.ip_unprivileged_port_start", 0)
        listener.settimeout(10)
        client = dial_from(lab, 900)
        server, peer = listener.accept()
        assert peer[0] == lab.client.ipv4 and peer[1] != 900
        server.close()
        assert client.recv(1) == b""
        client.close()
        assert relay.wait_for_record(lambda line: line["client"].endswith(":900"))["source"] == "address"
    lab.stop_intercepting()


@pytest.mark.parametrize("preserve", ["address", "full"])
def test_a_client_with_a_link_local_address_is_served_as_whom_it_can_be(fresh_lab: Lab, preserve: str) -> None:
    """No server beyond the link could answer fe80::, and a socket with it goes nowhere else. What 169.254 may do is up
    to routes, as it is for a direct connection."""
    lab = fresh_lab
    lab.relay.run(["ip", "addr", "add", "169.254.7.1/16", "dev", "rc"])
    lab.client.run(["ip", "addr", "add", "169.254.7.2/16", "dev", "cr"])
    shown = lab.client.run(["ip", "-6", "addr", "show", "dev", "cr", "scope", "link"]).stdout
    found = re.search(r"fe80::[0-9a-f:]+", shown)
    assert found, shown
    servers = {host.name: EchoServer(host) for host in (lab.server, lab.relay)}
    with lab.relay_process("--intercept-inbound", str(PORT), "--preserve-source", preserve) as relay:
        for host in (lab.server, lab.relay):
            for address, family in ((found[0], socket.AF_INET6), ("169.254.7.2", socket.AF_INET)):
                with from_link(lab, address, host.address(family)) as sock:
                    assert ping(sock) == ""
                    name = sock.getsockname()
                record = relay.wait_for_record(lambda line, n=name: line["client"].endswith(f":{n[1]}"))
                assert address in record["client"] and record["outcome"] == "completed"
                imitated = preserve if host is lab.server else "address"
                assert record["source"] == ("relay" if family == socket.AF_INET6 else imitated)
                own = own_address(lab, host) if family == socket.AF_INET6 else address
                assert servers[host.name].peers.pop() == own
    for server in servers.values():
        server.close()


def own_address(lab: Lab, host: Host) -> str:
    """Of the relay, as a server on this host sees it."""
    return "fd81:1::1" if host is lab.relay else lab.relay_address(socket.AF_INET6)


def from_link(lab: Lab, address: str, server: str) -> socket.socket:
    """A connection of a client that has this address on its link to the relay."""
    sock = lab.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.settimeout(10)
    if ":" in address:
        index = int(lab.client.run(["ip", "-o", "link", "show", "dev", "cr"]).stdout.split(":")[0])
        sock.bind((address, 0, 0, index))
    else:
        sock.bind((address, 0))
    sock.connect((server, PORT))
    return sock


def dial_from(lab: Lab, port: int) -> socket.socket:
    sock = lab.client.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("0.0.0.0", port))
    sock.settimeout(10)
    sock.connect((lab.server.ipv4, PORT))
    return sock
