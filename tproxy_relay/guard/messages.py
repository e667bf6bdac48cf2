"""What a guard and a relay say to each other: orders and events, and how each is written on the channel.

A guard may be handed over between two versions of the program. So what is on the channel does not change: a name, in
`order` or `event`, and fields; one that may be left out is. An order that a guard does not know is refused; an event
that a relay does not know counts for what it says in fields that it does know; fields that nobody knows are ignored.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.ruleset import STATES
from tproxy_relay.ipc.channel import Channel, Message

MAX_WORDS = 4000
"""Characters of one word of an event: a message has room for them (channel.py), and a log line should end."""


# --- from a relay to its guard


@dataclass(frozen=True)
class Start:
    """The first message to a guard: have this plan in the kernel, in that state, for the relay with this process id."""

    plan: Plan
    backend: str
    state: State
    pid: int

    def to_message(self) -> Message:
        """The JSON object that goes on the channel."""
        return {"plan": plans.to_json(self.plan), "backend": self.backend, "state": self.state, "pid": self.pid}


@dataclass(frozen=True)
class Drain:
    """Take no new connections; those that are relayed go on."""

    NAME: ClassVar[str] = "drain"

    def to_message(self) -> Message:
        """The JSON object that goes on the channel."""
        return {"order": self.NAME}


@dataclass(frozen=True)
class Remove:
    """Leave the host as it was, and end."""

    NAME: ClassVar[str] = "remove"

    def to_message(self) -> Message:
        """The JSON object that goes on the channel."""
        return {"order": self.NAME}


@dataclass(frozen=True)
class Replace:
    """Have another plan, for the relay with this process id. A descriptor that comes with it is for standard error."""

    NAME: ClassVar[str] = "replace"

    plan: Plan
    state: State | None
    """None: the one that there is."""
    pid: int

    def to_message(self) -> Message:
        """The JSON object that goes on the channel."""
        message = {"order": self.NAME, "plan": plans.to_json(self.plan), "state": self.state, "pid": self.pid}
        return {name: value for name, value in message.items() if value is not None}


@dataclass(frozen=True)
class Serve:
    """Belong to the relay with this process id from now on: the descriptor that comes with it is a channel to it."""

    NAME: ClassVar[str] = "serve"

    pid: int

    def to_message(self) -> Message:
        """The JSON object that goes on the channel."""
        return {"order": self.NAME, "pid": self.pid}


Order = Start | Drain | Remove | Replace | Serve


def start_of(message: Message) -> Start:
    """The first message to a guard. Raises RelayError if it is not understood."""
    plan = _plan_of(message)
    return Start(plan, message["backend"], message["state"], message["pid"])


def replace_of(message: Message) -> Replace:
    """An order of that name. Raises RelayError if its plan, state or process is not understood."""
    return Replace(_plan_of(message), message.get("state"), message["pid"])


def serve_of(message: Message, descriptors: Sequence[int]) -> Serve:
    """An order of that name. Raises RelayError if it names no process, or does not come with one descriptor."""
    if len(descriptors) != 1 or type(message.get("pid")) is not int:
        raise RelayError("the guard of the ruleset was asked to serve nobody")
    return Serve(message["pid"])


def _plan_of(message: Message) -> Plan:
    """The plan of a message, which may come from another version of the program."""
    try:
        if message.get("state", "active") not in STATES or type(message["pid"]) is not int:
            raise ValueError
        return plans.from_json(message["plan"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RelayError(
            "the guard of the ruleset is of another version and does not understand this plan: restart the relay"
        ) from error


# --- from a guard to its relay


@dataclass(frozen=True)
class Installed:
    """The ruleset is in the kernel: the answer to the first message."""

    backend: str
    state: State


@dataclass(frozen=True)
class Failed:
    """It could not be installed, and the guard ends."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Restored:
    """Somebody had changed the rules, and they have been put back."""

    what: str
    state: State


@dataclass(frozen=True)
class Trouble:
    """The rules could not be changed or put back; the guard goes on trying."""

    message: str


@dataclass(frozen=True)
class Well:
    """What was wrong with the rules is put right: the trouble is over."""


@dataclass(frozen=True)
class Changed:
    """The state is another one: `draining`, `lingering` (for a relay before this one) or `removed`."""

    state: str
    pid: int | None = None
    """Of the guard, which ends: with `removed`."""


@dataclass(frozen=True)
class Replaced:
    """Another plan is in force: an answer."""

    plan: str
    """Its digest."""
    state: State


@dataclass(frozen=True)
class Refused:
    """The order was not carried out, and all is as it was: an answer."""

    message: str
    exit_code: int


@dataclass(frozen=True)
class Serving:
    """The first words to a relay that it was handed over to."""

    backend: str
    plan: str
    """Its digest."""
    state: State


@dataclass(frozen=True)
class Orphaned:
    """To a relay before the present one: no rule takes new connections any more. `at_once`: and the rules go."""

    at_once: bool = False


@dataclass(frozen=True)
class Warned:
    """A line for the log, as a warning."""

    message: str


@dataclass(frozen=True)
class HostChanged:
    """Others have changed rules, rules of routing or links of this host."""


@dataclass(frozen=True)
class Counted:
    """How many first packets of connections the rules have taken since they were loaded, by direction; a packet that
    was sent again counts again."""

    inbound: int = 0
    outbound: int = 0


@dataclass(frozen=True)
class Unknown:
    """An event of another version of the program."""

    backend: str | None = None
    state: str | None = None
    pid: int | None = None


Event = (
    Installed
    | Failed
    | Restored
    | Trouble
    | Well
    | Changed
    | Replaced
    | Refused
    | Serving
    | Orphaned
    | Warned
    | HostChanged
    | Counted
    | Unknown
)

_EVENTS: dict[str, type[Event]] = {
    "installed": Installed,
    "failed": Failed,
    "restored": Restored,
    "trouble": Trouble,
    "well": Well,
    "changed": Changed,
    "replaced": Replaced,
    "refused": Refused,
    "serving": Serving,
    "orphaned": Orphaned,
    "warning": Warned,
    "host-changed": HostChanged,
    "counted": Counted,
}
_NAMES = {kind: name for name, kind in _EVENTS.items()}


def event_to_message(event: Event) -> Message:
    """As it goes on the channel, words cut where they are too many."""
    fields = {field.name: (getattr(event, field.name), field.default) for field in dataclasses.fields(event)}
    said = {name: value for name, (value, default) in fields.items() if value != default}
    return {"event": _NAMES[type(event)], **{name: _cut(value) for name, value in said.items()}}


def event_of(message: Message) -> Event:
    """The event. Raises KeyError if it lacks a field that an event of its name has."""
    name = message["event"]
    kind = _EVENTS.get(name, Unknown) if isinstance(name, str) else Unknown
    wanted = [one for one in dataclasses.fields(kind) if one.default is dataclasses.MISSING or one.name in message]
    return kind(**{one.name: message[one.name] for one in wanted})


def _cut(value: Any) -> Any:
    return value[:MAX_WORDS] if isinstance(value, str) else value


# --- on the channel


def send_event(talk: Channel, event: Event) -> None:
    """To the relay; it is no error if nobody is left to read it."""
    talk.send(event_to_message(event))


def send_order(talk: Channel, order: Order, *descriptors: int) -> bool:
    """To the guard; False if it has died. Raises RelayError if there is no room in a message for the plan."""
    try:
        return talk.send(order.to_message(), descriptors)
    except ValueError as error:
        raise RelayError("the plan of the ruleset is too long for its guard: name fewer ranges of ports") from error


def receive_order(talk: Channel) -> tuple[Message, list[int]] | None:
    """What the relay says next, and the descriptors that come with it; None at its end. What is no message is an order
    that nobody knows."""
    try:
        return talk.receive()
    except ValueError:
        return {}, []


def receive_event(talk: Channel) -> Message | None:
    """What the guard says next, as it goes on the channel; None at its end. What is no event is passed over."""
    while True:
        try:
            received = talk.receive()
        except ValueError:
            continue  # of another version, perhaps
        except OSError:
            return None
        if received is None:
            return None
        message, descriptors = received
        for fd in descriptors:
            os.close(fd)
        if "event" in message:
            return message
