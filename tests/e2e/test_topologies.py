"""The main job in every place that a relay can stand: each cell of the matrix, with the relay's own ruleset.

A relay with one configuration serves the six cells of its row. Each proves that it was intercepted by the relay's
record of that very connection.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NoReturn

import pytest
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT
from topologies import HOSTILE, PLACES, Place, ends

from tproxy_relay.lab import Lab, LabError, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr


@dataclass(frozen=True)
class Row:
    """One configuration of relay and host."""

    backend: str
    mode: str = "tproxy"
    preserve: str = "no"
    hostile: bool = False
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = (self.backend, self.mode, self.preserve, "hostile" if self.hostile else "normal", *self.more)
        return "-".join(words).replace("---", "-")


MATRIX = [Row(*cell) for cell in product(BACKENDS, ("tproxy",), ("no", "address", "full"), (False, True))]
MATRIX += [Row(backend, "redirect") for backend in BACKENDS]
MATRIX += [Row("nft", more=("--bind", "127.0.0.1,::1")), Row("iptables-nft", more=("--bind", "127.0.0.1,::1"))]
QUICK = {Row("nft"), Row("nft", preserve="address", hostile=True), Row("nft", "redirect")}


@dataclass
class Stage:
    """The lab with the relay of one row at work."""

    lab: Lab
    relay: RelayProcess
    row: Row


@pytest.fixture(
    scope="module",
    params=[pytest.param(row, id=str(row), marks=[] if row in QUICK else pytest.mark.slow) for row in MATRIX],
)
def stage(request: pytest.FixtureRequest, require_or_skip: Callable[[str], NoReturn]) -> Iterator[Stage]:
    row = request.param
    with contextlib.ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab())
        except LabError as error:
            require_or_skip(str(error))
        for name, value in HOSTILE.items() if row.hostile else ():
            lab.relay.set_sysctl(name, value)
        options = ("--backend", row.backend, "--mode", row.mode, "--preserve-source", row.preserve, *row.more)
        yield Stage(lab, stack.enter_context(lab.relay_process(*BOTH_WAYS, *options)), row)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.topology)
def test_an_exchange_goes_through_the_relay(stage: Stage, place: Place, family: int) -> None:
    record, client, peer = exchange(stage, place, family)
    _, server_host = ends(stage.lab, place)
    assert record["orig_dst"] == str(from_sockaddr((server_host.address(family), PORT)))
    assert record["client"] == str(from_sockaddr(client))
    assert record["outcome"] == "completed"
    assert (record["bytes_up"], record["bytes_down"]) == (7, 10)
    check_source(record, stage, place, family, client, peer)


def exchange(stage, place, family):  # type: ignore[no-untyped-def]
    """One request and its answer; the record, the client's address, and whom the server saw."""
    client_host, server_host = ends(stage.lab, place)
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
        record = stage.relay.record_of(client)
        name = client.getsockname()
        client.close()
        return record, name, peer


def check_source(record, stage, place, family, client, peer):  # type: ignore[no-untyped-def]
    """The server saw what the record says, and the record says what the place allows."""
    expected = "relay" if stage.row.preserve == "no" else place.can_preserve[stage.row.preserve == "full"]
    assert record["source"] == expected
    assert record["upstream_local"] == str(from_sockaddr(peer))
    if expected == "full":
        assert peer[:2] == client[:2]
    elif expected == "address":
        assert peer[0] == client[0]
    elif place.topology == "host":
        assert peer[0] == stage.lab.relay.address(family)
    else:
        assert peer[0] == stage.lab.relay_address(family)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_nobody_outside_can_dial_a_listener_on_loopback(lab: Lab, family: int) -> None:
    with lab.relay_process(*BOTH_WAYS, "--bind", "127.0.0.1,::1"), pytest.raises(ConnectionRefusedError):
        lab.client.connect(lab.relay.address(family), 15006)


def test_an_interface_limits_what_is_intercepted(lab: Lab) -> None:
    with lab.relay_process("--intercept-inbound", str(PORT), "--interface", "rc") as relay:
        for source, destination, through in ((lab.client, lab.server, True), (lab.server, lab.client, False)):
            with destination.listen(PORT) as listener, source.connect(destination.ipv4, PORT) as client:
                accepted, peer = listener.accept()
                accepted.close()
                assert (peer == client.getsockname()) is not through
                if through:
                    client.shutdown(socket.SHUT_WR)
                    assert relay.record_of(client)["orig_dst"] == f"{destination.ipv4}:{PORT}"
        assert len(relay.records()) == 1


def test_without_a_relay_the_lab_routes_directly() -> None:
    """The control: what the tests above would show if nothing was intercepted."""
    with Lab() as lab, lab.server.listen(PORT) as listener:
        client = lab.client.connect(lab.server.ipv4, PORT)
        server, peer = listener.accept()
        assert peer == client.getsockname()
        server.close()
        client.close()
