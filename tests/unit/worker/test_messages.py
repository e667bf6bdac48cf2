"""What supervisor and worker say to each other is the same thing at the other end of a channel."""

from collections.abc import Iterator

import pytest

from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel, Message
from tproxy_relay.worker import messages
from tproxy_relay.worker.messages import Event, Order


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = channel.pair()
    yield one, other
    one.close()
    other.close()


def through(ends: tuple[Channel, Channel], message: Message) -> Message:
    """The message as the other process sees it."""
    assert ends[0].send(message)
    received = ends[1].receive(1)
    assert received is not None
    return received[0]


ORDERS = [
    messages.Serve(),
    messages.Leave(None, 0.0, None),
    messages.Leave((), 1.5, 30.0),
    messages.Leave(("127.0.0.1:15002", "[::1]:15002"), 1.5, 0.0),
    messages.Stop(),
    messages.LogLive(),
    messages.ListSessions(None),
    messages.ListSessions({"port": "80"}),
    messages.Abort("1f-1-1", 1000),
]
EVENTS = [messages.Ready(), messages.Left(), messages.Failed("no such account", 78)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_an_order_arrives_as_it_was_given(ends: tuple[Channel, Channel], order: Order) -> None:
    there = messages.order_of(through(ends, order.to_message()))
    assert (type(there), there) == (type(order), order)


@pytest.mark.parametrize("event", EVENTS, ids=str)
def test_an_event_arrives_as_it_was_sent(ends: tuple[Channel, Channel], event: Event) -> None:
    there = messages.event_of(through(ends, event.to_message()))
    assert (type(there), there) == (type(event), event)


def test_no_two_of_them_have_the_same_word() -> None:
    for kind in (Order, Event):
        words = [one.word for one in kind.__subclasses__()]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("order", [one for one in ORDERS if len(one.to_message()) > 1], ids=str)
def test_nothing_of_an_order_is_left_to_a_default(order: Order) -> None:
    """A supervisor of another version must not be guessed at."""
    for name in order.to_message():
        message = order.to_message()
        del message[name]
        with pytest.raises(KeyError, match=name):
            messages.order_of(message)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({}, KeyError),
        ({"event": []}, TypeError),
        ({"event": "failed"}, KeyError),
        ({"event": "failed", "message": "x", "exit_code": "y"}, ValueError),
        ({"event": "failed", "message": "x", "exit_code": []}, TypeError),
        ({"event": "failed", "message": "x", "exit_code": float("inf")}, OverflowError),
    ],
    ids=str,
)
def test_what_no_worker_says(message: Message, error: type[Exception]) -> None:
    with pytest.raises(error):
        messages.event_of(message)


def test_what_another_version_says_means_nothing() -> None:
    assert messages.order_of({"order": "sing"}) is None
    assert messages.event_of({"event": "sing"}) is None
