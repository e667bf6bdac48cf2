"""When the relay dies, no transfer that it carried looks complete: both ends see a reset, never an EOF.

A worker takes its own connections along; the supervisor has none, but the workers die with it.
"""

import os
import signal
import socket

import pytest
from exchanges import Ends, read_to_end
from relay_fixtures import intercepting_relay
from rows import Seen

from tproxy_relay.lab import Lab, RelayProcess

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
PORT = 8000
VICTIMS = [pytest.param("pid", id="supervisor"), pytest.param("worker", id="worker")]


relay = intercepting_relay((PORT,))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=["SIGKILL", "SIGSEGV"])
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.row("H2", "SIGKILL and SIGSEGV of supervisor and worker", "both ends ECONNRESET, never EOF")
def test_a_relay_that_dies_in_mid_transfer_resets_both_ends(
    lab: Lab, relay: RelayProcess, family: int, victim: str, number: int, seen: Seen
) -> None:
    ends = Ends(lab, family, PORT)
    ends.client.sendall(b"request")
    ends.server.sendall(b"a part of the answer")
    assert ends.client.recv(100) == b"a part of the answer"
    assert ends.server.recv(100) == b"request"
    relay.wait_for_line(lambda line: line["message"] == "connection open")
    os.kill(getattr(relay, victim), number)
    assert read_to_end(ends.client)[-1] == "ECONNRESET"
    assert read_to_end(ends.server)[-1] == "ECONNRESET"
    ends.close()
    seen("ECONNRESET, ECONNRESET")


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("half_closed", ["client", "server"])
def test_a_relay_that_dies_after_a_half_close_resets_the_open_direction(
    lab: Lab, relay: RelayProcess, half_closed: str, victim: str
) -> None:
    ends = Ends(lab, socket.AF_INET, PORT)
    closing, other = (ends.client, ends.server) if half_closed == "client" else (ends.server, ends.client)
    closing.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b"", "the half-close did not come through"
    other.sendall(b"still")
    assert closing.recv(5) == b"still"
    os.kill(getattr(relay, victim), signal.SIGKILL)
    assert read_to_end(closing)[-1] == "ECONNRESET", "a transfer that broke off looks complete"
    ends.close()
