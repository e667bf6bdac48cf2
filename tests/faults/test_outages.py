"""Outages of the network that connections outlive, and those that they do not.

With `keepalive 1` in place of the default 60 everything that hangs on it takes a sixtieth of the time. The default
itself is read back from a socket in unit/net/test_sockets.py.
"""

import contextlib
import itertools
import socket
from collections.abc import Iterator

import pytest
from exchanges import PATIENCE, Ends
from outages import cut_off, outage

from tproxy_relay.lab import Host, Lab, LabError, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

PORT = 8000
OUTAGE = 9.0
"""Seconds: nine minutes, were it not scaled down. Probes that come in it are lost; four were enough once."""
GONE = 13.0
"""Seconds after which an idle peer counts as gone: the first probe after one, and twelve more."""
FAMILIES = (socket.AF_INET, socket.AF_INET6)

pytestmark = pytest.mark.slow


@pytest.fixture
def relay(fresh_lab: Lab) -> Iterator[RelayProcess]:
    fresh_lab.intercept((PORT, PORT + 1, PORT + 2, PORT + 3))
    with fresh_lab.relay_process("--keepalive", "1") as running:
        yield running


@contextlib.contextmanager
def connections(lab: Lab, relay: RelayProcess) -> Iterator[list[Ends]]:
    """Two of each family, each known to be the relay's."""
    with contextlib.ExitStack() as stack:
        made = []
        for number, family in enumerate((*FAMILIES, *FAMILIES)):
            ends = Ends(lab, family, PORT + number)
            stack.callback(ends.close)
            client = str(from_sockaddr(ends.name))
            relay.wait_for_line(lambda line, c=client: line["message"] == "connection open" and line["client"] == c)
            made.append(ends)
        yield made


@pytest.mark.parametrize("who", ["client", "server"])
def test_an_outage_goes_unnoticed(fresh_lab: Lab, relay: RelayProcess, who: str) -> None:
    host: Host = getattr(fresh_lab, who)
    with connections(fresh_lab, relay) as made:
        busy = made[2:]
        with outage(host):
            for ends in busy:
                (ends.server if who == "client" else ends.client).sendall(b"meanwhile")
            with pytest.raises(LabError):
                relay.wait_for_record(lambda line: True, timeout=OUTAGE)  # whoever gives up does so now
        for ends in busy:
            receive(ends.client if who == "client" else ends.server, b"meanwhile")
        for ends, (one, other) in itertools.product(made, (("client", "server"), ("server", "client"))):
            getattr(ends, one).sendall(b"still there?")
            receive(getattr(ends, other), b"still there?")
        assert not relay.records()


def test_who_never_comes_back_is_found_out(fresh_lab: Lab, relay: RelayProcess) -> None:
    """Idle ones by keepalive. Data that is not acknowledged is the kernel's matter (net.ipv4.tcp_retries2): its 15
    tries take a quarter of an hour, 4 take six seconds."""
    fresh_lab.relay.set_sysctl("net.ipv4.tcp_retries2", 4)
    with connections(fresh_lab, relay) as made:
        cut_off(fresh_lab.client)
        for ends in made[2:]:
            ends.server.sendall(b"to nobody")
        records = [relay.record_of(ends.client, timeout=GONE + PATIENCE) for ends in made]
        assert {record["outcome"] for record in records} == {"client-reset"}
        assert {record["error"] for record in records} == {"Connection timed out"}
        took = [record["seconds"] for record in records]
        assert all(GONE - 1 <= seconds < GONE + PATIENCE for seconds in took[:2]), took


def receive(sock: socket.socket, expected: bytes) -> None:
    """Exactly that, within the time that a retransmission of the kernel's may take after such an outage."""
    sock.settimeout(2 * OUTAGE + PATIENCE)
    got = b""
    while len(got) < len(expected) and (block := sock.recv(len(expected) - len(got))):
        got += block
    assert got == expected
