"""The vocabulary of the access line."""

from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.linux import TcpInfo
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.access_record import ConnectionRecord

FULL = ConnectionRecord(
    id="a-1",
    listener="0.0.0.0:15006",
    client=Endpoint("192.0.2.1", 4000),
    orig_dst=Endpoint("198.51.100.1", 80),
    destination=Endpoint("198.51.100.1", 80),
    upstream_local=Endpoint("203.0.113.1", 5000),
    source="relay",
    outcome=Outcome.COMPLETED,
    error=None,
    bytes_up=1,
    bytes_down=2,
    seconds=1.23456789,
    connect_seconds=0.00012345,
    client_tcp=TcpInfo(1, 1500, 0),
    upstream_tcp=TcpInfo(7, 250, 3),
)


def test_the_outcomes_are_a_promise() -> None:
    assert {str(outcome) for outcome in Outcome} == {
        "completed", "client-reset", "upstream-reset", "connect-refused", "connect-timeout", "connect-unreachable",
        "no-local-port", "self-call", "not-intercepted", "denied", "loop", "over-limit", "evicted", "idle",
        "half-close-timeout", "drained", "aborted", "internal-error",
    }  # fmt: skip
    assert f"{Outcome.CLIENT_RESET}" == "client-reset", "in every Python"


def test_what_is_ordinary() -> None:
    assert {outcome.value for outcome in Outcome if outcome.ordinary} == {
        "completed", "client-reset", "upstream-reset", "evicted", "idle", "half-close-timeout", "drained", "aborted",
    }  # fmt: skip


def test_all_fields() -> None:
    assert FULL.as_fields() == {
        "id": "a-1",
        "listener": "0.0.0.0:15006",
        "client": "192.0.2.1:4000",
        "orig_dst": "198.51.100.1:80",
        "upstream_local": "203.0.113.1:5000",
        "source": "relay",
        "outcome": "completed",
        "bytes_up": 1,
        "bytes_down": 2,
        "seconds": 1.234568,
        "connect_seconds": 0.000123,
        "client_rtt_ms": 1.5,
        "client_retransmits": 0,
        "upstream_rtt_ms": 0.25,
        "upstream_retransmits": 3,
    }
    assert type(FULL.as_fields()["outcome"]) is str


def test_a_destination_of_its_own_is_said() -> None:
    fields = FULL._replace(destination=Endpoint("::1", 81)).as_fields()
    assert fields["destination"] == "[::1]:81"


def test_what_there_is_not_is_left_out() -> None:
    bare = FULL._replace(
        orig_dst=None, destination=None, upstream_local=None, connect_seconds=None, client_tcp=None,
        upstream_tcp=None, error="why", bytes_up=0,
    ).as_fields()  # fmt: skip
    assert set(bare) == {
        "id", "listener", "client", "source", "outcome", "error", "bytes_up", "bytes_down", "seconds",
    }  # fmt: skip
    assert bare["bytes_up"] == 0, "nothing is a number too"


def test_the_self_probe_is_marked() -> None:
    assert "self_probe" not in FULL.as_fields()
    assert "self_probe" not in FULL._replace(orig_dst=None).as_fields()
    probe = FULL._replace(client=Endpoint("192.0.2.2", 4000), orig_dst=Endpoint("192.0.2.6", 80))
    assert probe.as_fields()["self_probe"] is True
