"""What one end does is what the other end sees: every exchange directly, through the relay, and compared."""

import select
import socket

import pytest
from exchanges import EXCHANGES, Ends, Exchange, Saw, play, read_to_end, see_reset
from relay_fixtures import intercepting_relay

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
DIRECT, INTERCEPTED = 9000, 8000
"""Ports of the server: the rules steer the second to the relay."""


relay = intercepting_relay((INTERCEPTED,), scope="module")


def record_of(relay: RelayProcess, ends: Ends) -> dict[str, object]:
    """The access line of this conversation: it was really intercepted, or this fails."""
    client = str(from_sockaddr(ends.name))
    return relay.wait_for_record(lambda line: line["client"] == client)


def played(lab: Lab, family: int, port: int, exchange: Exchange) -> tuple[dict[str, Saw], Ends]:
    ends = Ends(lab, family, port, exchange)
    try:
        return play(exchange, ends.client, ends.server), ends
    finally:
        ends.close()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)
def test_both_ends_see_what_they_would_see_without_the_relay(
    lab: Lab, relay: RelayProcess, exchange: Exchange, family: int
) -> None:
    direct, ends = played(lab, family, DIRECT, exchange)
    assert ends.seen[:2] == ends.name[:2], "the direct connection was intercepted"
    relayed, ends = played(lab, family, INTERCEPTED, exchange)
    record = record_of(relay, ends)
    assert str(record["orig_dst"]).endswith(f":{INTERCEPTED}")
    assert ends.seen[0] == lab.relay_address(family), "the server did not see the relay"
    assert "nothing more came" not in str(direct), "the exchange itself is broken"
    assert relayed == direct
    assert record["outcome"] == exchange.outcome


def test_a_server_that_refuses_is_seen_as_a_reset(lab: Lab, relay: RelayProcess) -> None:
    """The one difference that a relay cannot hide without holding the SYN: the handshake comes first."""
    took = []
    for _ in range(5):
        client, seconds = see_reset(lab.client, lab.server.ipv4, INTERCEPTED)
        port = client.getsockname()[1]
        record = relay.wait_for_record(lambda line: line["client"].endswith(f":{port}"))
        assert record["outcome"] == "connect-refused"
        client.close()
        took.append(seconds)
    assert min(took) < 0.05


def test_a_reader_that_rests_slows_the_sender_down(lab: Lab, relay: RelayProcess) -> None:
    ends = Ends(lab, socket.AF_INET, INTERCEPTED)
    ends.client.setblocking(False)
    taken = 0
    times_without_room = 0
    while times_without_room < 5 and taken < 200_000_000:
        try:
            taken += ends.client.send(b"x" * 100_000)
            times_without_room = 0
        except BlockingIOError:
            times_without_room += 1
            poll_for_room(ends.client)
    assert taken < 100_000_000, "the relay takes data that nobody reads"
    ends.client.setblocking(True)
    ends.client.shutdown(socket.SHUT_WR)
    assert read_to_end(ends.server)[0] == taken
    ends.close()
    assert record_of(relay, ends)["bytes_up"] == taken


def poll_for_room(sock: socket.socket) -> None:
    """Until there is room, or nobody makes any."""
    select.select([], [sock], [], 0.3)
