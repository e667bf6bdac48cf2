"""The main job in every place that a relay can stand, for both families, with and without the client's address."""

import socket
from dataclasses import dataclass

import pytest

from tproxy_relay.endpoint import from_sockaddr
from tproxy_relay.lab import Host, Lab, Topology

PORT = 8000
FAMILIES = {"v4": socket.AF_INET, "v6": socket.AF_INET6}
HOSTILE = {
    "net.ipv4.conf.all.rp_filter": 1,
    "net.ipv4.conf.default.rp_filter": 1,
    "net.ipv4.conf.rc.rp_filter": 1,
    "net.ipv4.conf.rs.rp_filter": 1,
    "net.ipv4.conf.all.src_valid_mark": 1,
    "net.ipv4.tcp_fwmark_accept": 1,
    "net.ipv4.fwmark_reflect": 1,
    "net.ipv6.fwmark_reflect": 1,
}
"""Settings under which the usual recipes lose all traffic."""


@dataclass(frozen=True)
class Place:
    """Who connects to whom, and whose address the server can see when the source is preserved."""

    topology: Topology
    client: str
    server: str
    can_preserve: tuple[str, ...]
    """What `source` says for preserve-source `address` and `full`."""


PLACES = (
    Place("gateway", "client", "server", ("address", "full")),
    Place("host", "client", "relay", ("address", "address")),  # full: two sockets with the same four numbers
    Place("local", "relay", "server", ("relay", "relay")),  # a client on this host is never imitated
)


def ends(lab: Lab, place: Place) -> tuple[Host, Host]:
    return getattr(lab, place.client), getattr(lab, place.server)


@pytest.mark.parametrize("sysctls", [{}, HOSTILE], ids=["normal", "hostile"])
@pytest.mark.parametrize("preserve", ["no", "address", "full"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.topology)
def test_an_exchange_goes_through_the_relay(preserve: str, place: Place, sysctls: dict[str, int]) -> None:
    with Lab() as lab:
        for name, value in sysctls.items():
            lab.relay.set_sysctl(name, value)
        lab.intercept((PORT,), topology=place.topology, preserve_source=preserve != "no")
        with lab.relay_process("--preserve-source", preserve) as relay:
            for family in FAMILIES.values():
                record, client, peer = exchange(lab, place, family, relay)
                check_record(record, lab, place, family, client)
                check_source(record, lab, place, family, preserve, client, peer)
            relay.stop()


def exchange(lab, place, family, relay):  # type: ignore[no-untyped-def]
    """One request and its answer; the record, the client's address, and whom the server saw."""
    client_host, server_host = ends(lab, place)
    with server_host.listen(PORT, family) as listener:
        listener.settimeout(5)
        client = client_host.connect(server_host.address(family), PORT)
        server, peer = listener.accept()
        server.settimeout(5)
        assert client.getpeername()[:2] == (server_host.address(family), PORT)
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        assert server.recv(100) == b"request" and server.recv(100) == b""
        server.sendall(b"the answer")
        server.close()
        assert client.recv(100) == b"the answer" and client.recv(100) == b""
        record = relay.record_of(client)
        name = client.getsockname()
        client.close()
        return record, name, peer


def check_record(record, lab, place, family, client):  # type: ignore[no-untyped-def]
    _, server_host = ends(lab, place)
    assert record["orig_dst"] == str(from_sockaddr((server_host.address(family), PORT)))
    assert record["client"] == str(from_sockaddr(client))
    assert record["outcome"] == "completed"
    assert (record["bytes_up"], record["bytes_down"]) == (7, 10)


def check_source(record, lab, place, family, preserve, client, peer):  # type: ignore[no-untyped-def]
    """The server saw what the record says, and the record says what the place allows."""
    expected = "relay" if preserve == "no" else place.can_preserve[preserve == "full"]
    assert record["source"] == expected
    assert record["upstream_local"] == str(from_sockaddr(peer))
    if expected == "full":
        assert peer[:2] == client[:2]
    elif expected == "address":
        assert peer[0] == client[0]
    elif place.topology == "host":
        assert peer[0] == lab.relay.address(family)
    else:
        assert peer[0] == lab.relay_address(family)


def test_without_a_relay_the_lab_routes_directly() -> None:
    """The control: what the tests above would show if nothing was intercepted."""
    with Lab() as lab, lab.server.listen(PORT) as listener:
        client = lab.client.connect(lab.server.ipv4, PORT)
        server, peer = listener.accept()
        assert peer == client.getsockname()
        server.close()
        client.close()
