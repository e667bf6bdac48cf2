"""What a supervisor and a worker say to each other, each message a type: orders go down, events come up.

They travel as JSON objects over the worker's channel. The first message of all is none of these: it is the worker's
specification (spec.py). An order that is to be answered comes with a socket for the answer.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from tproxy_relay.ipc.channel import Message


@dataclass(frozen=True)
class Order:
    """What a worker is to do."""

    word: ClassVar[str]

    def to_message(self) -> Message:
        """The order as the channel carries it."""
        return {"order": self.word, **asdict(self)}


@dataclass(frozen=True)
class Serve(Order):
    """Accept connections from now on: the first order, to a worker that is ready."""

    word = "serve"


@dataclass(frozen=True)
class Leave(Order):
    """Take no more clients, finish what there is, and end."""

    word = "leave"
    listeners: tuple[str, ...] | None
    """Names of those whose clients are this worker's to the last, because nobody else has them; None: all."""
    grace: float
    """Seconds for which clients may still come there that were intercepted before."""
    timeout: float | None
    """Seconds that open connections may go on after that; then they are reset. None: for as long as they like."""


@dataclass(frozen=True)
class Stop(Order):
    """Reset all connections at once, and end."""

    word = "stop"


@dataclass(frozen=True)
class LogLive(Order):
    """Write a line about each live connection to the log."""

    word = "live"


@dataclass(frozen=True)
class ListSessions(Order):
    """Answer with the live connections, as sessions.py writes them."""

    word = "sessions"
    query: Mapping[str, str] | None
    """What session_query.parse takes; None: only how many there are, and what was refused."""


@dataclass(frozen=True)
class Abort(Order):
    """Reset one connection, and answer whether it was there."""

    word = "abort"
    id: str
    account: int
    """Uid of the operator who wants it."""


@dataclass(frozen=True)
class Event:
    """What has become of a worker."""

    word: ClassVar[str]

    def to_message(self) -> Message:
        """The event as the channel carries it."""
        return {"event": self.word, **asdict(self)}


@dataclass(frozen=True)
class Ready(Event):
    """It has all that it needs, and waits for `Serve`."""

    word = "ready"


@dataclass(frozen=True)
class Left(Event):
    """It has closed the listeners that others have, too, as `Leave` has it."""

    word = "left"


@dataclass(frozen=True)
class Failed(Event):
    """It cannot start for a reason that an operator can mend, and ends."""

    word = "failed"
    message: str
    exit_code: int
    """Of the errors in errors.py."""


_PLAIN_ORDERS: dict[str, Order] = {order.word: order for order in (Serve(), Stop(), LogLive())}
_PLAIN_EVENTS: dict[str, Event] = {event.word: event for event in (Ready(), Left())}


def order_of(message: Message) -> Order | None:
    """The order in a message of the supervisor; None for one that this version does not know. Raises KeyError for one
    that lacks something."""
    word = message["order"]
    if word in _PLAIN_ORDERS:
        return _PLAIN_ORDERS[word]
    if word == Leave.word:
        names = message["listeners"]
        return Leave(None if names is None else tuple(names), message["grace"], message["timeout"])
    if word == ListSessions.word:
        return ListSessions(message["query"])
    if word == Abort.word:
        return Abort(message["id"], message["account"])
    return None


def event_of(message: Message) -> Event | None:
    """The event in a message of a worker, which somebody may have taken over; None for one that this version does not
    know. Raises KeyError, TypeError, ValueError or OverflowError for what no worker says."""
    word = message["event"]
    if word in _PLAIN_EVENTS:
        return _PLAIN_EVENTS[word]
    if word == Failed.word:
        return Failed(str(message["message"]), int(message["exit_code"]))
    return None
