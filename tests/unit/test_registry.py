"""Counting in and out, per source and per outcome, and knowing our own flows again."""

import threading
from dataclasses import dataclass, field

import pytest

from tproxy_relay.endpoint import Endpoint
from tproxy_relay.registry import Flow, Registry


@dataclass
class Someone:
    """A connection, as far as the registry cares."""

    id: str
    client: Endpoint
    flows: list[Flow] = field(default_factory=list)


def someone(number: int, host: str = "192.0.2.1") -> Someone:
    """One with its own port."""
    return Someone(f"c{number}", Endpoint(host, 1000 + number))


FLOW = Flow(Endpoint("192.0.2.1", 1), Endpoint("192.0.2.2", 2))


def test_in_and_out() -> None:
    registry: Registry[Someone] = Registry()
    first, second = someone(1), someone(2)
    registry.add(first)
    registry.add(second)
    assert (len(registry), registry.live()) == (2, [first, second])
    registry.remove(first, "completed")
    assert (len(registry), registry.live()) == (1, [second])
    registry.remove(second, "idle")
    registry.remove(second, "aborted")
    assert (len(registry), registry.live(), registry.accepted_total) == (0, [], 2)
    assert registry.closed_by_outcome == {"completed": 1, "idle": 1}


def test_how_many_a_source_has() -> None:
    registry: Registry[Someone] = Registry()
    ones = [someone(number) for number in range(3)]
    assert [registry.add(one) for one in ones] == [1, 2, 3]
    assert registry.add(someone(9, "192.0.2.9")) == 1
    registry.remove(ones[0], "completed")
    assert registry.add(someone(4)) == 3


def test_a_source_that_is_gone_is_forgotten() -> None:
    registry: Registry[Someone] = Registry()
    for number in range(100):
        one = someone(number, f"192.0.2.{number}")
        registry.add(one)
        registry.remove(one, "completed")
    assert not registry._per_source


@pytest.mark.parametrize("opened_first", [True, False])
def test_whoever_comes_second_sees_the_loop(opened_first: bool) -> None:
    registry: Registry[Someone] = Registry()
    opener, accepted = someone(1), someone(2)
    if opened_first:
        assert not registry.is_loop_opened(opener, FLOW)
        assert registry.is_loop_accepted(accepted, FLOW)
    else:
        assert not registry.is_loop_accepted(accepted, FLOW)
        assert registry.is_loop_opened(opener, FLOW)


def test_a_connection_is_no_loop_of_itself() -> None:
    """With preserve-source full both legs have the same four numbers."""
    registry: Registry[Someone] = Registry()
    one = someone(1)
    assert not registry.is_loop_accepted(one, FLOW)
    assert not registry.is_loop_opened(one, FLOW)
    assert not registry.is_loop_accepted(one, FLOW)


def test_the_flows_of_the_gone_are_forgotten() -> None:
    registry: Registry[Someone] = Registry()
    opener, accepted = someone(1), someone(2)
    for one in (opener, accepted):
        registry.add(one)
        one.flows.append(FLOW)
    registry.is_loop_opened(opener, FLOW)
    registry.remove(opener, "completed")
    assert not registry.is_loop_accepted(accepted, FLOW)
    registry.remove(accepted, "completed")
    assert not registry._opened and not registry._accepted


def test_a_flow_that_has_a_new_owner_stays_when_the_old_one_goes() -> None:
    registry: Registry[Someone] = Registry()
    old, new, third = someone(1), someone(2), someone(3)
    for one in (old, new):
        registry.add(one)
        one.flows.append(FLOW)
        registry.is_loop_opened(one, FLOW)
    registry.remove(old, "completed")
    assert registry.is_loop_accepted(third, FLOW)


def test_many_threads_at_once() -> None:
    registry: Registry[Someone] = Registry()

    def come_and_go(first: int) -> None:
        for number in range(first, first + 500):
            one = someone(number)
            registry.add(one)
            registry.live()
            registry.remove(one, "completed")

    threads = [threading.Thread(target=come_and_go, args=(first,)) for first in range(0, 4000, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(registry), registry.accepted_total) == (0, 4000)
    assert registry.closed_by_outcome == {"completed": 4000}
    assert not registry._per_source
