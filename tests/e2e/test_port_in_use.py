"""A program on the relay's host that wants the port which relayed connections have: what the manual says of it."""

import errno
import socket

import pytest
from interception import PORT, EchoServer, ping

from tproxy_relay.lab import Host, Lab


def refusal(host: Host, address: str, *, reuse: bool) -> int:
    """The error of a program that listens there; 0 for none."""
    with host.socket(socket.AF_INET) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            sock.bind((address, PORT))
            sock.listen()
        except OSError as error:
            return error.errno or -1
    return 0


@pytest.mark.parametrize("mode, refused", [("tproxy", errno.EADDRINUSE), ("redirect", 0)])
def test_the_port_of_a_relayed_connection(fresh_lab: Lab, mode: str, refused: int) -> None:
    server = EchoServer(fresh_lab.server)
    options = ("--intercept-inbound", str(PORT), "--mode", mode)
    with fresh_lab.relay_process(*options) as relay, fresh_lab.client.connect("10.81.2.2", PORT) as sock:
        assert ping(sock) == ""
        assert refusal(fresh_lab.relay, "0.0.0.0", reuse=False) == refused
        assert refusal(fresh_lab.relay, "0.0.0.0", reuse=True) == 0
        assert refusal(fresh_lab.relay, "10.81.1.1", reuse=False) == 0, "clients asked for another address"
        sock.close()
        relay.wait_for_record(lambda record: record["outcome"] == "completed")
    server.close()
