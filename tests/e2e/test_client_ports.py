"""Clients whose own port has the number of one of ours: to the kernel, an answer to them could be for our listener."""

import socket

import pytest
from exchanges import reset
from flows import echo_server
from interception import BACKENDS, FAMILIES, PORT, ping

from tproxy_relay.lab import Lab

OURS = (15002, 15006)
OTHER = PORT + 1
"""Not intercepted."""
EVERYWHERE = ("--bind", "0.0.0.0,::", "--intercept-inbound", str(PORT))


def dial(lab: Lab, family: int, from_port: int, port: int) -> socket.socket:
    """From the client to the server."""
    sock = lab.client.socket(family)
    sock.settimeout(5)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((lab.client.address(family), from_port))
    sock.connect((lab.server.address(family), port))
    return sock


@pytest.mark.parametrize("preserve", ["no", "full"])
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=[] if name == "nft" else pytest.mark.slow) for name in BACKENDS]
)
def test_it_may_have_the_number_of_ours(fresh_lab: Lab, backend: str, preserve: str) -> None:
    """With listeners on all addresses, and whether it is intercepted or goes through."""
    options = (*EVERYWHERE, "--backend", backend, "--preserve-source", preserve)
    with echo_server(fresh_lab.server, PORT, OTHER), fresh_lab.relay_process(*options) as relay:
        for family in FAMILIES.values():
            for number in OURS:
                for port in (OTHER, PORT, OTHER):
                    sock = dial(fresh_lab, family, number, port)
                    assert ping(sock) == ""
                    reset(sock)
        relay.stop()
        clients = sorted(record["client"].rpartition(":")[2] for record in relay.records())
        assert clients == sorted(map(str, OURS * 2)), "those to the port that is intercepted, and no others"
        assert {record["orig_dst"].rpartition(":")[2] for record in relay.records()} == {str(PORT)}
