"""Counting in and out, per source and per outcome, and what was carried."""

import threading
import time

import slots
from registries import Someone, Two, registry_of, someone

from tproxy_relay.ipc.histogram import CONNECT, DURATION, bucket
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.relay.registry import NOTHING_CARRIED, Registry


def test_in_and_out(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot)
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
    registry: Registry[Someone] = registry_of(slot)
    ones = [someone(number) for number in range(3)]
    assert [registry.add(one) for one in ones] == [1, 2, 3]
    assert registry.add(someone(9, "192.0.2.9")) == 1
    registry.remove(ones[0], "completed")
    assert registry.add(someone(4)) == 3


def test_a_source_that_is_gone_is_forgotten(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot)
    for number in range(100):
        one = someone(number, f"192.0.2.{number}")
        registry.add(one)
        registry.remove(one, "completed")
    assert registry.debug_state() == {"sources": 0}


def test_many_threads_at_once() -> None:
    with slots.slots(2) as (slot, other):
        many_threads_at_once(slot)
        assert not other.sources.elsewhere(slot.scoreboard.digest("192.0.2.1"))


def many_threads_at_once(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot, share_sources=True)

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
    assert registry.debug_state() == {"sources": 0}


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
        one, other = (registry_of(slot) for slot in made)
        assert [one.add(someone(1)), one.add(someone(2)), other.add(someone(3))] == [1, 2, 1]


def test_a_source_whose_worker_is_gone_is_forgotten() -> None:
    with slots.slots(2) as made:
        one, other = (registry_of(slot, share_sources=True) for slot in made)
        one.add(someone(1))
        made[0].scoreboard.clear(0)
        assert other.add(someone(2)) == 1


def test_what_connections_carry(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot)
    one, other = someone(1), someone(2)
    registry.add(one)
    registry.add(other)
    one.moved = (100, 3000)
    registry.sample(0.5)
    assert slot.traffic[:2] == (100, 3000)
    assert (one.traffic, other.traffic) == ((100, 3000, 200.0, 6000.0), NOTHING_CARRIED)
    registry.sample(0.5)
    assert slot.traffic[:2] == (100, 3000), "nothing is counted twice"
    assert one.traffic == (100, 3000, 0.0, 0.0)
    one.moved, other.moved = (101, 3000), (0, 7)
    registry.remove(other, "completed")
    registry.remove(other, "completed")
    assert slot.traffic[:2] == (100, 3007), "what was moved since the last sample"
    registry.sample(1.0)
    assert slot.traffic[:2] == (101, 3007)


def test_how_long_they_take(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot)
    one, other = someone(1), someone(2)
    one.born_at = time.monotonic() - 30
    registry.connected(0.004)
    for connection in (one, other):
        registry.add(connection)
        registry.remove(connection, "completed")
    connect, duration = slot.traffic.connect, slot.traffic.duration
    assert (connect.total, connect.counts[bucket(CONNECT, 0.004)]) == (1, 1)
    assert (duration.total, duration.counts[bucket(DURATION, 30)], duration.counts[0]) == (2, 1, 1)
