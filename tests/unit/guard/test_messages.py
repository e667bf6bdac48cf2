"""What goes on the channel, to the letter: the guard at its other end may be of another version."""

import json
from typing import Any

import pytest
from plans import PLAN

from tproxy_relay.errors import RelayError
from tproxy_relay.guard import messages
from tproxy_relay.guard.messages import Drain, Event, Order, Remove, Replace, Serve, Start
from tproxy_relay.intercept import plan as plans
from tproxy_relay.ipc import channel

TEXT = plans.to_json(PLAN)

ORDERS: list[tuple[Order, dict[str, Any]]] = [
    (Start(PLAN, "nft", "active", 7), {"plan": TEXT, "backend": "nft", "state": "active", "pid": 7}),
    (Drain(), {"order": "drain"}),
    (Remove(), {"order": "remove"}),
    (Replace(PLAN, "draining", 7), {"order": "replace", "plan": TEXT, "state": "draining", "pid": 7}),
    (Serve(7), {"order": "serve", "pid": 7}),
]

EVENTS: list[tuple[Event, dict[str, Any]]] = [
    (messages.Installed("nft", "active"), {"event": "installed", "backend": "nft", "state": "active"}),
    (messages.Failed("no", 71), {"event": "failed", "message": "no", "exit_code": 71}),
    (messages.Restored("a; b", "active"), {"event": "restored", "what": "a; b", "state": "active"}),
    (messages.Trouble("no"), {"event": "trouble", "message": "no"}),
    (messages.Well(), {"event": "well"}),
    (messages.Changed("draining"), {"event": "changed", "state": "draining"}),
    (messages.Changed("removed", 7), {"event": "changed", "state": "removed", "pid": 7}),
    (messages.Replaced("12345678", "active"), {"event": "replaced", "plan": "12345678", "state": "active"}),
    (messages.Refused("no", 1), {"event": "refused", "message": "no", "exit_code": 1}),
    (
        messages.Serving("nft", "12345678", "active"),
        {"event": "serving", "backend": "nft", "plan": "12345678", "state": "active"},
    ),
    (messages.Orphaned(), {"event": "orphaned"}),
    (messages.Orphaned(at_once=True), {"event": "orphaned", "at_once": True}),
    (messages.Warned("so"), {"event": "warning", "message": "so"}),
    (messages.HostChanged(), {"event": "host-changed"}),
    (messages.Counted(), {"event": "counted"}),
    (messages.Counted(3, 4), {"event": "counted", "inbound": 3, "outbound": 4}),
]


@pytest.mark.parametrize("order, message", ORDERS, ids=lambda value: type(value).__name__)
def test_orders(order: Order, message: dict[str, Any]) -> None:
    assert json.dumps(order.to_message()) == json.dumps(message), "the order of the fields, too"


@pytest.mark.parametrize("event, message", EVENTS, ids=lambda value: type(value).__name__)
def test_events_there_and_back(event: Event, message: dict[str, Any]) -> None:
    assert json.dumps(messages.event_to_message(event)) == json.dumps(message)
    assert messages.event_of(message) == event
    assert messages.event_of({**message, "later": 1}) == event, "what a later version says beside it means nothing"


def test_every_event_is_tried_here() -> None:
    assert {*map(type, (event for event, _ in EVENTS)), messages.Unknown} == set(messages.Event.__args__)


def test_orders_are_read_back() -> None:
    start, _, _, replace, serve = (order for order, _ in ORDERS)
    assert messages.start_of(start.to_message()) == start
    assert messages.replace_of(replace.to_message()) == replace
    assert messages.serve_of(serve.to_message(), [9]) == serve


def test_a_plan_without_a_state_keeps_the_one_that_there_is() -> None:
    message = {"order": "replace", "plan": TEXT, "pid": 7}
    assert messages.replace_of(message) == Replace(PLAN, None, 7)
    assert Replace(PLAN, None, 7).to_message() == message


@pytest.mark.parametrize(
    "descriptors, message", [([], {"pid": 7}), ([1, 2], {"pid": 7}), ([1], {}), ([1], {"pid": ""})]
)
def test_who_is_nobody_is_not_served(descriptors: list[int], message: dict[str, Any]) -> None:
    with pytest.raises(RelayError, match="serve nobody"):
        messages.serve_of(message, descriptors)


@pytest.mark.parametrize("name", ["sung", None, 5, ["installed"]])
def test_an_event_that_nobody_knows_counts_for_what_is_known_of_it(name: object) -> None:
    event = messages.event_of({"event": name, "state": "draining", "backend": "nft", "song": "la"})
    assert event == messages.Unknown("nft", "draining")


def test_an_event_without_what_belongs_to_it() -> None:
    with pytest.raises(KeyError):
        messages.event_of({"event": "trouble"})


def test_words_have_an_end() -> None:
    assert messages.event_to_message(messages.Trouble("x" * 5000))["message"] == "x" * messages.MAX_WORDS


def test_on_a_channel() -> None:
    ours, theirs = channel.pair()
    assert messages.send_order(ours, Drain())
    assert messages.receive_order(theirs) == ({"order": "drain"}, [])
    messages.send_event(theirs, messages.Well())
    assert ours.receive(5) == ({"event": "well"}, [])
    theirs.close()
    assert not messages.send_order(ours, Drain())
    assert messages.receive_order(ours) is None
    messages.send_event(ours, messages.Well())  # nobody is left
    ours.close()
