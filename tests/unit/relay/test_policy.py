"""Where a connection may go, and as whom."""

from typing import Any

import pytest

from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import policy
from tproxy_relay.relay.policy import Policy, RefusedError
from tproxy_relay.settings import Network, PortRange, Settings

LOCAL, ELSEWHERE = "127.0.0.1", "192.0.2.1"
TARGET = Endpoint("192.0.2.99", 99)


def choose(
    orig_dst: Endpoint | None, target: Endpoint | None = None, by: int = 15006, **settings: Any
) -> Endpoint | Outcome:
    """What two listeners, on 15002 and 15006, do with a connection that one of them accepted."""
    try:
        return Policy.of_settings(Settings(**settings), frozenset({15002, 15006}), target).choose(orig_dst, by)
    except RefusedError as refusal:
        assert str(refusal)
        return refusal.outcome


@pytest.mark.parametrize("target", [None, TARGET])
@pytest.mark.parametrize("orig_dst", [Endpoint(ELSEWHERE, 80), Endpoint(ELSEWHERE, 15006)])
def test_an_intercepted_connection_goes_where_it_was_going(orig_dst: Endpoint, target: Endpoint | None) -> None:
    assert choose(orig_dst, target) == orig_dst


@pytest.mark.parametrize("orig_dst", [None, Endpoint(LOCAL, 15006), Endpoint("127.8.9.1", 15006)])
def test_a_direct_connection_goes_to_the_target_or_nowhere(orig_dst: Endpoint | None) -> None:
    assert choose(orig_dst) is Outcome.NOT_INTERCEPTED
    assert choose(orig_dst, TARGET) == TARGET


@pytest.mark.parametrize("target", [None, TARGET])
def test_an_intercepted_connection_to_another_listener_is_refused(target: Endpoint | None) -> None:
    assert choose(Endpoint(LOCAL, 15002), target) is Outcome.SELF_CALL


@pytest.mark.parametrize("port", [15002, 15006])
def test_a_target_that_is_a_listener_is_refused(port: int) -> None:
    assert choose(None, Endpoint(LOCAL, port)) is Outcome.SELF_CALL
    assert choose(Endpoint(LOCAL, 15006), Endpoint("0.0.0.0", port)) is Outcome.SELF_CALL


@pytest.mark.parametrize("target", [None, TARGET])
def test_a_destination_that_is_denied(target: Endpoint | None) -> None:
    assert choose(Endpoint(LOCAL, 80), target) is Outcome.DENIED
    assert choose(Endpoint("::", 80), target) is Outcome.DENIED
    assert choose(Endpoint("64:ff9b::7f00:1", 80), target) is Outcome.DENIED
    assert choose(Endpoint(ELSEWHERE, 80), target, deny=(Network("192.0.2.0/24"),)) is Outcome.DENIED
    assert choose(Endpoint(LOCAL, 80), target, allow=(Network("127.0.0.1/32"),)) == Endpoint(LOCAL, 80)


def test_a_target_is_allowed_because_the_operator_named_it() -> None:
    assert choose(None, Endpoint(LOCAL, 80)) == Endpoint(LOCAL, 80)
    assert choose(None, TARGET, deny=(Network("0.0.0.0/0"),)) == TARGET


def test_what_is_allowed_is_still_not_the_relay_itself() -> None:
    everything = (Network("127.0.0.1/32"),)
    assert choose(Endpoint(LOCAL, 15002), allow=everything) is Outcome.SELF_CALL
    assert choose(Endpoint(LOCAL, 15006), allow=everything) is Outcome.NOT_INTERCEPTED


@pytest.fixture
def own_address(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this host that is no special one. Tests of the unit kind may not add one; tests/e2e has real
    ones."""
    monkeypatch.setattr(policy.sockets, "is_local_address", lambda endpoint: endpoint.host == "198.51.100.1")
    return "198.51.100.1"


def test_own_addresses_are_for_the_servers_that_are_intercepted(own_address: str) -> None:
    served = {"intercept_inbound": (PortRange(80, 89),)}
    assert choose(Endpoint(own_address, 80), **served) == Endpoint(own_address, 80)
    assert choose(Endpoint(own_address, 80), by=15002, **served) is Outcome.DENIED, "it came by the other listener"
    assert choose(Endpoint(own_address, 22), **served) is Outcome.DENIED
    assert choose(Endpoint(own_address, 22)) is Outcome.DENIED
    assert choose(Endpoint("64:ff9b::198.51.100.1", 80)) is Outcome.DENIED, "a translator would bring it back"
    assert choose(Endpoint(own_address, 22), allow=(Network(own_address + "/32", PortRange(22, 22)),)) == Endpoint(
        own_address, 22
    )
    assert choose(Endpoint(own_address, 23), allow=(Network(own_address + "/32", PortRange(22, 22)),)) is Outcome.DENIED
    assert choose(Endpoint(ELSEWHERE, 22), **served) == Endpoint(ELSEWHERE, 22)


def test_it_is_not_asked_for_each_connection_whether_an_address_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    local = policy.LocalAddresses()
    assert Endpoint(LOCAL, 1) in local
    with monkeypatch.context() as patch:
        patch.setattr(policy.sockets, "is_local_address", lambda endpoint: False)
        assert Endpoint(LOCAL, 2) in local, "remembered"
        patch.setattr(policy, "LIFETIME", 0.0)
        assert Endpoint(LOCAL, 2) not in local, "asked again"
        patch.setattr(policy, "_REMEMBERED", 3)
        for number in range(20):
            assert Endpoint(f"192.0.2.{number}", 1) not in local
        assert local.debug_state()["known"] <= 3


CLIENT, NEIGHBOUR = Endpoint("198.51.100.7", 4000), Endpoint(LOCAL, 4000)


@pytest.mark.parametrize(
    ("preserve", "client", "destination", "expected"),
    [
        ("no", CLIENT, Endpoint(ELSEWHERE, 80), ("relay",)),
        ("address", CLIENT, Endpoint(ELSEWHERE, 80), ("address",)),
        ("full", CLIENT, Endpoint(ELSEWHERE, 80), ("full", "address")),
        ("full", CLIENT, Endpoint(LOCAL, 80), ("address",)),
        ("address", CLIENT, Endpoint(LOCAL, 80), ("address",)),
        ("full", NEIGHBOUR, Endpoint(ELSEWHERE, 80), ("relay",)),
        ("address", NEIGHBOUR, Endpoint(ELSEWHERE, 80), ("relay",)),
        ("full", CLIENT, Endpoint("2001:db8::1", 80), ("relay",)),
        ("address", Endpoint("2001:db8::7", 4000), Endpoint(ELSEWHERE, 80), ("relay",)),
        ("full", Endpoint("2001:db8::7", 4000), Endpoint("2001:db8::1", 80), ("full", "address")),
        ("full", Endpoint("fe80::7", 4000, 2), Endpoint("2001:db8::1", 80), ("relay",)),
        ("address", Endpoint("fe80::7", 4000, 2), Endpoint("2001:db8::1", 80), ("relay",)),
        ("address", Endpoint("169.254.7.7", 4000), Endpoint(ELSEWHERE, 80), ("address",)),
    ],
)
def test_whose_address_the_server_sees(
    preserve: str, client: Endpoint, destination: Endpoint, expected: tuple[str, ...]
) -> None:
    assert policy.sources(Settings(preserve_source=preserve), client, destination) == expected


def test_a_client_port_that_is_intercepted_itself_is_not_taken_over() -> None:
    settings = Settings(preserve_source="full", intercept_inbound=(PortRange(80, 80), PortRange(3000, 5000)))
    assert policy.sources(settings, CLIENT, Endpoint(ELSEWHERE, 80)) == ("address",)
    assert policy.sources(settings, Endpoint(CLIENT.host, 5001), Endpoint(ELSEWHERE, 80)) == ("full", "address")
