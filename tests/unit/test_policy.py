"""Where a connection may go, and as whom."""

import pytest

from tproxy_relay import policy
from tproxy_relay.endpoint import Endpoint
from tproxy_relay.policy import Destinations, RefusedError
from tproxy_relay.record import Outcome
from tproxy_relay.settings import PortRange, Settings

LOCAL, ELSEWHERE = "127.0.0.1", "192.0.2.1"
TARGET = Endpoint("192.0.2.99", 99)


def choose(orig_dst: Endpoint | None, target: Endpoint | None = None) -> Endpoint | Outcome:
    """What two listeners, on 15002 and 15006, do with a connection that the second accepted."""
    try:
        return Destinations(frozenset({15002, 15006}), target).choose(orig_dst, 15006)
    except RefusedError as refusal:
        assert str(refusal)
        return refusal.outcome


@pytest.mark.parametrize("target", [None, TARGET])
@pytest.mark.parametrize("orig_dst", [Endpoint(ELSEWHERE, 80), Endpoint(ELSEWHERE, 15006), Endpoint(LOCAL, 80)])
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
