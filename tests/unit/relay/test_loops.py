"""Knowing our own flows again, in one worker and in several."""

import pytest
from registries import FLOW, Someone, Two, registry_of, someone

from tproxy_relay.ipc.slot import Slot
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import loops
from tproxy_relay.relay.registry import Registry


@pytest.mark.parametrize("opened_first", [True, False])
def test_whoever_comes_second_sees_the_loop(slot: Slot, opened_first: bool) -> None:
    registry: Registry[Someone] = registry_of(slot)
    opener, accepted = someone(1), someone(2)
    if opened_first:
        assert not registry.loops.note_opened(opener.id, FLOW)
        assert registry.loops.note_accepted(accepted.id, FLOW)
    else:
        assert not registry.loops.note_accepted(accepted.id, FLOW)
        assert registry.loops.note_opened(opener.id, FLOW)


def test_a_connection_is_no_loop_of_itself(slot: Slot) -> None:
    """With preserve-source full both legs have the same four numbers."""
    registry: Registry[Someone] = registry_of(slot)
    one = someone(1)
    assert not registry.loops.note_accepted(one.id, FLOW)
    assert not registry.loops.note_opened(one.id, FLOW)
    assert not registry.loops.note_accepted(one.id, FLOW)


def test_the_flows_of_the_gone_are_forgotten(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot)
    opener, accepted = someone(1), someone(2)
    for one in (opener, accepted):
        registry.add(one)
        one.flows.append(FLOW)
    registry.loops.note_opened(opener.id, FLOW)
    registry.remove(opener, "completed")
    assert not registry.loops.note_accepted(accepted.id, FLOW)
    registry.remove(accepted, "completed")
    assert registry.loops.debug_state() == {"flows": 0}


def test_a_flow_that_has_a_new_owner_stays_when_the_old_one_goes(slot: Slot) -> None:
    registry: Registry[Someone] = registry_of(slot)
    old, new, third = someone(1), someone(2), someone(3)
    for one in (old, new):
        registry.add(one)
        one.flows.append(FLOW)
        registry.loops.note_opened(one.id, FLOW)
    registry.remove(old, "completed")
    assert registry.loops.note_accepted(third.id, FLOW)


@pytest.mark.parametrize("opened_first", [True, False])
def test_a_loop_through_another_worker(two: Two, opened_first: bool) -> None:
    opener, accepted = someone(1), someone(1)
    if opened_first:
        assert not two[0].loops.note_opened(opener.id, FLOW)
        assert two[1].loops.note_accepted(accepted.id, FLOW)
    else:
        assert not two[1].loops.note_accepted(accepted.id, FLOW)
        assert two[0].loops.note_opened(opener.id, FLOW)


def test_the_flows_of_the_gone_are_forgotten_by_the_others_too(two: Two) -> None:
    opener, accepted = someone(1), someone(2)
    two[0].add(opener)
    opener.flows.append(FLOW)
    assert not two[0].loops.note_opened(opener.id, FLOW)
    two[0].remove(opener, "completed")
    assert not two[1].loops.note_accepted(accepted.id, FLOW)


def test_a_flow_that_has_a_new_owner_is_shared_until_that_one_goes(two: Two) -> None:
    old, new, third = someone(1), someone(2), someone(3)
    for one in (old, new):
        two[0].add(one)
        one.flows.append(FLOW)
        two[0].loops.note_opened(one.id, FLOW)
    two[0].remove(old, "completed")
    assert two[1].loops.note_accepted(third.id, FLOW)
    two[0].remove(new, "completed")
    assert not two[1].loops.note_accepted(third.id, FLOW)


def test_the_refusal_tells_the_operator_what_is_missing() -> None:
    refusal = loops.refusal(FLOW)
    assert refusal.outcome is Outcome.LOOP
    assert f"the relay's own connection {FLOW} was intercepted" in str(refusal)
