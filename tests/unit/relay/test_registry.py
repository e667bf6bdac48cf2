"""Counting in and out, per source and per outcome, and knowing our own flows again."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import slots

from tproxy_relay.ipc.histogram import CONNECT, DURATION, bucket
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.relay.registry import NOTHING_CARRIED, ConnectionTraffic, Flow, Registry


@dataclass
class Someone:
    """A connection, as far as the registry cares."""

    id: str
    client: Endpoint
    flows: list[Flow] = field(default_factory=list)
    moved: tuple[int, int] = (0, 0)
    traffic: ConnectionTraffic = NOTHING_CARRIED
    born_at: float = field(default_factory=time.monotonic)


def someone(number: int, host: str = "192.0.2.1") -> Someone:
    """One with its own port."""
    return Someone(f"c{number}", Endpoint(host, 1000 + number))


@pytest.fixture
def slot() -> Iterator[Slot]:
    with slots.slots() as (made,):
        yield made


@pytest.fixture
def two() -> Iterator[tuple[Registry[Someone], Registry[Someone]]]:
    """Those of two workers."""
    with slots.slots(2) as (one, other):
        yield Registry(one, share_sources=True), Registry(other, share_sources=True)


Two = tuple[Registry[Someone], Registry[Someone]]

FLOW = Flow(Endpoint("192.0.2.1", 1), Endpoint("192.0.2.2", 2))


def test_in_and_out(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    first, second = someone(1), someone(2)
    registry.add(first)
    registry.add(second)
    assert (len(registry), registry.live()) == (2, [first, second])
    registry.remove(first, "completed")
    assert (len(registry), registry.live()) == (1, [second])
    registry.remove(second, "idle")
    registry.remove(second, "aborted")
    assert (len(registry), registry.live()) == (0, [])
    assert slot.numbers == (2, 0, {"completed": 1, "idle": 1})


def test_how_many_a_source_has(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    ones = [someone(number) for number in range(3)]
    assert [registry.add(one) for one in ones] == [1, 2, 3]
    assert registry.add(someone(9, "192.0.2.9")) == 1
    registry.remove(ones[0], "completed")
    assert registry.add(someone(4)) == 3


def test_a_source_that_is_gone_is_forgotten(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    for number in range(100):
        one = someone(number, f"192.0.2.{number}")
        registry.add(one)
        registry.remove(one, "completed")
    assert not registry._per_source


@pytest.mark.parametrize("opened_first", [True, False])
def test_whoever_comes_second_sees_the_loop(slot: Slot, opened_first: bool) -> None:
    registry: Registry[Someone] = Registry(slot)
    opener, accepted = someone(1), someone(2)
    if opened_first:
        assert not registry.is_loop_opened(opener, FLOW)
        assert registry.is_loop_accepted(accepted, FLOW)
    else:
        assert not registry.is_loop_accepted(accepted, FLOW)
        assert registry.is_loop_opened(opener, FLOW)


def test_a_connection_is_no_loop_of_itself(slot: Slot) -> None:
    """With preserve-source full both legs have the same four numbers."""
    registry: Registry[Someone] = Registry(slot)
    one = someone(1)
    assert not registry.is_loop_accepted(one, FLOW)
    assert not registry.is_loop_opened(one, FLOW)
    assert not registry.is_loop_accepted(one, FLOW)


def test_the_flows_of_the_gone_are_forgotten(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    opener, accepted = someone(1), someone(2)
    for one in (opener, accepted):
        registry.add(one)
        one.flows.append(FLOW)
    registry.is_loop_opened(opener, FLOW)
    registry.remove(opener, "completed")
    assert not registry.is_loop_accepted(accepted, FLOW)
    registry.remove(accepted, "completed")
    assert not registry._opened and not registry._accepted


def test_a_flow_that_has_a_new_owner_stays_when_the_old_one_goes(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    old, new, third = someone(1), someone(2), someone(3)
    for one in (old, new):
        registry.add(one)
        one.flows.append(FLOW)
        registry.is_loop_opened(one, FLOW)
    registry.remove(old, "completed")
    assert registry.is_loop_accepted(third, FLOW)


def test_many_threads_at_once(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot, share_sources=True)

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
    assert len(registry) == 0
    assert slot.numbers == (4000, 0, {"completed": 4000})
    assert not registry._per_source
    assert not slot.sources._own.count(slot.scoreboard.digest("192.0.2.1"))


# --- two workers


def test_how_many_a_source_has_with_all_workers(two: Two) -> None:
    ones = [someone(number) for number in range(4)]
    assert [two[number % 2].add(one) for number, one in enumerate(ones)] == [1, 2, 3, 4]
    assert two[1].add(someone(9, "192.0.2.9")) == 1
    two[0].remove(ones[0], "completed")
    two[0].remove(ones[0], "aborted")
    assert two[1].add(someone(4)) == 4


def test_what_a_source_has_with_others_is_not_asked_where_nothing_depends_on_it() -> None:
    with slots.slots(2) as made:
        one, other = (Registry[Someone](slot) for slot in made)
        assert [one.add(someone(1)), one.add(someone(2)), other.add(someone(3))] == [1, 2, 1]


def test_a_source_whose_worker_is_gone_is_forgotten(two: Two) -> None:
    two[0].add(someone(1))
    two[0]._slot.scoreboard.clear(0)
    assert two[1].add(someone(2)) == 1


@pytest.mark.parametrize("opened_first", [True, False])
def test_a_loop_through_another_worker(two: Two, opened_first: bool) -> None:
    opener, accepted = someone(1), someone(1)
    if opened_first:
        assert not two[0].is_loop_opened(opener, FLOW)
        assert two[1].is_loop_accepted(accepted, FLOW)
    else:
        assert not two[1].is_loop_accepted(accepted, FLOW)
        assert two[0].is_loop_opened(opener, FLOW)


def test_the_flows_of_the_gone_are_forgotten_by_the_others_too(two: Two) -> None:
    opener, accepted = someone(1), someone(2)
    two[0].add(opener)
    opener.flows.append(FLOW)
    assert not two[0].is_loop_opened(opener, FLOW)
    two[0].remove(opener, "completed")
    assert not two[1].is_loop_accepted(accepted, FLOW)


def test_a_flow_that_has_a_new_owner_is_shared_until_that_one_goes(two: Two) -> None:
    old, new, third = someone(1), someone(2), someone(3)
    for one in (old, new):
        two[0].add(one)
        one.flows.append(FLOW)
        two[0].is_loop_opened(one, FLOW)
    two[0].remove(old, "completed")
    assert two[1].is_loop_accepted(third, FLOW)
    two[0].remove(new, "completed")
    assert not two[1].is_loop_accepted(third, FLOW)


def test_what_connections_carry(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    one, other = someone(1), someone(2)
    registry.add(one)
    registry.add(other)
    one.moved = (100, 3000)
    registry.look(0.5)
    assert slot.traffic[:2] == (100, 3000)
    assert (one.traffic, other.traffic) == ((100, 3000, 200.0, 6000.0), NOTHING_CARRIED)
    registry.look(0.5)
    assert slot.traffic[:2] == (100, 3000), "nothing is counted twice"
    assert one.traffic == (100, 3000, 0.0, 0.0)
    one.moved, other.moved = (101, 3000), (0, 7)
    registry.remove(other, "completed")
    registry.remove(other, "completed")
    assert slot.traffic[:2] == (100, 3007), "what was moved since the last look"
    registry.look(1.0)
    assert slot.traffic[:2] == (101, 3007)


def test_how_long_they_take(slot: Slot) -> None:
    registry: Registry[Someone] = Registry(slot)
    one, other = someone(1), someone(2)
    one.born_at = time.monotonic() - 30
    registry.connected(0.004)
    for connection in (one, other):
        registry.add(connection)
        registry.remove(connection, "completed")
    connect, duration = slot.traffic.connect, slot.traffic.duration
    assert (connect.total, connect.counts[bucket(CONNECT, 0.004)]) == (1, 1)
    assert (duration.total, duration.counts[bucket(DURATION, 30)], duration.counts[0]) == (2, 1, 1)
