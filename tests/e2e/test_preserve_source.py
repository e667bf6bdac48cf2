"""Clients whose address and port the relay borrows, where that is not simple."""

import socket

from exchanges import data, read_to_end, reset

from tproxy_relay.lab import Lab

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


def dial_from(lab: Lab, port: int) -> socket.socket:
    sock = lab.client.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("0.0.0.0", port))
    sock.settimeout(10)
    sock.connect((lab.server.ipv4, PORT))
    return sock
