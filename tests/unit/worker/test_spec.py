"""What a worker is told travels as JSON, and is the same thing at the other end."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.ipc import channel
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.relay.policy import Policy
from tproxy_relay.settings import HostPort, Network, PortRange, Settings
from tproxy_relay.system.limits import Limits
from tproxy_relay.worker import spec
from tproxy_relay.worker.spec import WorkerSpec

finite = st.floats(allow_nan=False)  # which is not equal to itself
ports = st.integers(0, 65535)
st.register_type_strategy(float, finite)


def assigned(
    settings: Settings, tuning: Tuning, own_ports: frozenset[int], target: Endpoint | None, limits: Limits
) -> WorkerSpec:
    """What supervisor/generation.py makes of these."""
    return WorkerSpec(settings, tuning, Policy.of_settings(settings, own_ports, target), limits)


specs = st.builds(
    assigned,
    settings=st.from_type(Settings),  # every field by its type: a new option is tried without a word here
    tuning=st.builds(Tuning, st.integers(0), finite, st.integers(0, 1 << 31)),
    own_ports=st.frozensets(ports, max_size=5),
    target=st.none() | st.builds(Endpoint, st.text(), ports, ports),
    limits=st.builds(Limits, st.integers(1), st.integers(1)),
)


def types(value: object) -> object:
    """The types all the way down: a tuple is equal to a named one, and True to 1."""
    if isinstance(value, (tuple, list)):
        return type(value), [types(item) for item in value]
    return type(value)


def all_types(order: WorkerSpec) -> object:
    """Those of everything in it."""
    told = (order.settings, order.tuning, order.policy)
    return [{field.name: types(getattr(part, field.name)) for field in fields(part)} for part in told]


@given(specs, st.integers(0, 127))
@hypothesis_settings(max_examples=200, deadline=None)
def test_there_and_back(order: WorkerSpec, slot: int) -> None:
    message = json.loads(json.dumps(order.to_message(slot, 3)))
    assert (message["slot"], message["cpu"]) == (slot, 3)
    there = spec.of_message(message)
    assert there == order
    assert all_types(there) == all_types(order)
    assert type(there.limits) is Limits


RICH = Settings(
    ports=(1, 2),
    bind=("127.0.0.1", "::1"),
    intercept_inbound=(PortRange(80, 80), PortRange(8000, 8100)),
    intercept_outbound=(PortRange(443, 443),),
    target=HostPort("server.example", 80),
    allow=(Network("192.0.2.0/24"), Network("2001:db8::/32", PortRange(80, 81))),
    deny=(Network("0.0.0.0/0"),),
    user="nobody",
    workers=3,
)


def test_through_a_channel() -> None:
    one, other = channel.pair()
    policy = Policy.of_settings(RICH, frozenset({1, 2}), Endpoint("fe80::1", 80, 3))
    order = WorkerSpec(RICH, Tuning(60, 1.5, 4), policy, Limits(10, 5))
    one.send(order.to_message(7, None))
    told = other.receive(1)
    assert told is not None
    there = spec.of_message(told[0])
    assert (there, told[0]["slot"]) == (order, 7)
    assert str(there.settings.target) == "server.example:80"
    assert [str(one) for one in there.settings.intercept_inbound] == ["80", "8000-8100"]
    assert list(map(str, there.settings.allow)) == ["192.0.2.0/24", "[2001:db8::/32]:80-81"]
    assert str(there.policy.target) == "[fe80::1%3]:80"
    one.close()
    other.close()


@pytest.mark.parametrize("name", ["settings", "tuning", "policy", "limits"])
def test_nothing_of_it_is_left_to_a_default(name: str) -> None:
    """A worker of another version must not guess."""
    message = WorkerSpec(RICH, Tuning(60, 0.0, 0), Policy(frozenset(), None), Limits(1, 1)).to_message(0, None)
    del message[name]
    with pytest.raises(KeyError, match=name):
        spec.of_message(message)
