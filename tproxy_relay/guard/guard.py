"""The guard: a small process of its own that installs the ruleset, watches over it, and undoes it when the relay is
gone, however it went.

It talks to the relay's supervisor over its standard input, a channel (channel.py), whose end the kernel tells of a
process that was killed, too. Signals that are meant for the relay's whole group (Ctrl-C, a service manager's TERM) do
not concern it, nor the programs that it runs: they inherit that.

The first message is the plan, the backend's name, the state and the supervisor's process. Then come orders: `drain`,
`remove`, `replace` with another plan, and `serve` with the end of a channel to another supervisor, which it belongs to
from then on. It answers each, and tells without being asked when it had to put the rules back.

A supervisor that was followed by another one finishes its transfers, and packets of those need the rules, too. So the
guard keeps its channel, says `orphaned` when the last supervisor leaves, and lingers with rules that take nothing new
until the process is gone. If somebody else wants to have the ruleset meanwhile, it lingers no longer.
"""

import math
import os
import select
import selectors
import time
from collections.abc import Callable
from typing import Any

from tproxy_relay.errors import RelayError
from tproxy_relay.guard.netlink import Changes
from tproxy_relay.intercept import backends
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import routing
from tproxy_relay.intercept.backend import Backend
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.intercept.nft_owner import Holder
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.programs import ProgramError
from tproxy_relay.intercept.ruleset import STATES, Ruleset
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel, Message

SETTLE = 0.2
"""Seconds after a change before the rules are looked at: changes come in bursts."""
LOOK_INTERVAL = 2.0
"""Seconds between two looks at the least, and at the most where nobody tells of changes."""
SLOW_INTERVAL = 30.0
"""Seconds between two looks where changes are told: routes and interfaces are not."""

CLOSED_TIMEOUT = 10.0
"""Seconds for former relays where rules that refuse must take the place of those that know their connections: until
then new ones get no answer."""
FAREWELL = 1.5
"""Seconds for former relays to reset what they have, before the rules go that know of it."""

MAX_WORDS = 4000
"""Characters of one word that is told: a message has room for them (channel.py), and a log line should end."""


class Guard:
    """The ruleset of one relay, from its installation to its end."""

    def __init__(self, talk: Channel, plan: Plan, backend: str, state: State, pid: int) -> None:
        self._talk = talk
        self._pid = pid
        self._state: State = state
        self._holder: Holder | None = None
        self._in_trouble = False
        self._formers: list[Channel] = []
        self._last_step: Callable[[], None] | None = None
        self._until = math.inf
        self._lock = Lock()
        self._selector = selectors.DefaultSelector()
        hold = plan.on_failure == "open"
        chosen = backends.choose(backend, plan, hold=hold, warn=lambda line: self.tell("warning", message=line))
        self._changes = Changes(self._selector, nftables=chosen.tells_changes)
        self._ruleset = self._install(plan, chosen)
        self._look_at = time.monotonic() + self._interval
        self._looked_at = time.monotonic()

    def _install(self, plan: Plan, chosen: Backend) -> Ruleset:
        """Held by a child, if the rules are to go with the relay and the kernel can do that."""
        ruleset = Ruleset(plan, chosen)
        try:
            ruleset.install(self._state)
        except ProgramError:
            if not (plan.on_failure == "open" and isinstance(chosen, Nft)):
                raise
            ruleset = Ruleset(plan, Nft())
            ruleset.install(self._state)
        return ruleset

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._ruleset.backend.name

    @property
    def _plan(self) -> Plan:
        return self._ruleset.plan

    @property
    def _interval(self) -> float:
        return SLOW_INTERVAL if self._changes.complete else LOOK_INTERVAL

    def tell(self, event: str, **fields: Any) -> None:
        """A message to the relay; nobody is left to hear it after the relay's death."""
        tell(self._talk, event, **fields)

    def watch(self) -> None:
        """Until nobody needs the ruleset any more. Then it is removed, or does what `on-failure` says."""
        self._selector.register(self._talk, selectors.EVENT_READ)
        self._selector.register(self._lock, selectors.EVENT_READ)
        self._watch_holder()
        while self._last_step is None or self._formers and time.monotonic() < self._until:
            wake_at = min(self._look_at, self._until)
            ready = [key.fileobj for key, _ in self._selector.select(max(0.0, wake_at - time.monotonic()))]
            for former in [one for one in self._formers if one in ready]:
                self._hear_former(former)
            if self._talk in ready:
                self._hear()
            if self._lock in ready and self._lock.answer(self._pid, lingers=self._last_step is not None):
                self._until = 0.0
            if self._changes.told(ready):
                self._look_soon()
            if self._holder in ready and self._holder.has_ended():
                self._hold_again()
            if time.monotonic() >= self._look_at:
                self._look()
        self._part_with_formers()
        self._last_step()
        self._lock.close()
        self.tell("changed", state="removed", pid=os.getpid())

    def _hear(self) -> None:
        received = receive(self._talk)
        if received is None:
            self._selector.unregister(self._talk)
            self._talk.close()
            if self._last_step is None:
                self._leave(self.remove if self._opens else self.relay_died)
        elif received[0].get("order") == "remove":
            self._leave(self.remove)
        else:
            self._obey(*received)

    def _leave(self, last_step: Callable[[], None]) -> None:
        """The relay is done with the ruleset; those before it may not be."""
        self._last_step = last_step
        if not self._formers:
            return
        put_nothing_at(2)  # who reads the relay's standard error sees its end
        if last_step == self.remove:
            if self._state != "draining":
                self._drain()
            self._pid = os.getpid()
            self.tell("changed", state="lingering")
        elif self._closes:
            self._until = time.monotonic() + CLOSED_TIMEOUT
        self._tell_formers()
        if last_step != self.remove and not self._closes:
            self._formers.clear()  # the rules stay

    def _hear_former(self, former: Channel) -> None:
        """Only its end means anything."""
        received = receive(former)
        if received is None:
            self._selector.unregister(former)
            self._formers.remove(former)
            former.close()
        for fd in received[1] if received else ():
            os.close(fd)

    def _tell_formers(self, **how: bool) -> None:
        for former in self._formers:
            tell(former, "orphaned", **how)

    def _part_with_formers(self) -> None:
        """Those that are left reset their connections: without the rules these would hang."""
        self._tell_formers(at_once=True)
        until = time.monotonic() + FAREWELL
        while self._formers and (left := until - time.monotonic()) > 0:
            for former in select.select(self._formers, [], [], left)[0]:
                self._hear_former(former)

    def _obey(self, message: Message, descriptors: list[int]) -> None:
        orders: dict[object, Callable[[Message, list[int]], None]] = {
            "drain": lambda *_: self._drain_all(),
            "replace": self._replace,
            "serve": self._serve,
        }
        order = message.get("order")
        try:
            orders.get(order, _do_not_know)(message, descriptors)
        except RelayError as error:
            self.tell("refused", message=str(error), exit_code=error.exit_code)
        finally:
            for fd in descriptors:  # those that nobody wanted
                os.close(fd)

    def _watch_holder(self) -> None:
        if self._holder is not None:
            self._selector.unregister(self._holder)
        self._holder = self._ruleset.backend.holder
        if self._holder is not None:
            self._selector.register(self._holder, selectors.EVENT_READ)

    def _hold_again(self) -> None:
        """The holder has ended, and its table is gone: at once, because the servers now get packets of relayed
        connections, and reset them."""
        try:
            self._ruleset.backend.install(self._plan, self._state)
            self.tell("restored", what="the process that held the table had died", state=self._state)
        except RelayError as error:
            self._trouble(error)
        self._watch_holder()
        self._look_soon()

    def _look_soon(self) -> None:
        soon = max(time.monotonic() + SETTLE, self._looked_at + LOOK_INTERVAL)
        self._look_at = min(self._look_at, soon)

    def _look(self) -> None:
        """Compare the kernel with the plan, and put back what is gone."""
        interval = self._interval
        try:
            self._changes.forget()
            restored = self._ruleset.restore(self._state)
            if restored:
                self.tell("restored", what="; ".join(restored), state=self._state)
            elif self._in_trouble:
                self.tell("well")
            self._in_trouble = False
            if self._ruleset.backend.holder is not self._holder:
                self._watch_holder()
        except RelayError as error:
            interval = LOOK_INTERVAL
            self._trouble(error)
        self._looked_at = time.monotonic()
        self._look_at = self._looked_at + interval

    def _trouble(self, error: RelayError) -> None:
        self._in_trouble = True
        self.tell("trouble", message=str(error))

    def _drain_all(self) -> None:
        self._drain()
        self._tell_formers()

    def _drain(self) -> None:
        try:
            self._state = "draining"
            self._ruleset.change("draining")
            self.tell("changed", state="draining")
        except RelayError as error:
            self._trouble(error)
            self._look_soon()

    def _replace(self, order: Message, descriptors: list[int]) -> None:
        """Another plan, for the same relay or for one that has taken it over. That one brings its standard error, so
        that who reads the first one's sees its end."""
        for fd in descriptors[:1]:
            os.dup2(fd, 2)
        plan = understood(order)
        state: State = order.get("state", self._state)
        try:
            if (plan, state) != (self._plan, self._state):
                self._ruleset.replace(plan, self._state, state)
            self._state, self._pid = state, order["pid"]
        except RelayError:
            self._look_soon()
            raise
        finally:
            if self._ruleset.backend.holder is not self._holder:
                self._watch_holder()
        self.tell("replaced", plan=plan.digest, state=state)

    def _serve(self, order: Message, descriptors: list[int]) -> None:
        """Another supervisor takes the place of this one, which is a former one from now on."""
        if len(descriptors) != 1 or type(order.get("pid")) is not int:
            raise RelayError("the guard of the ruleset was asked to serve nobody")
        try:
            talk = channel.adopt(descriptors[0])
        except OSError as error:
            raise RelayError(f"the guard of the ruleset cannot talk to another relay: {error.strerror}") from error
        descriptors.clear()
        self._formers.append(self._talk)
        self._talk, self._pid = talk, order["pid"]
        self._selector.register(talk, selectors.EVENT_READ)
        self.tell("serving", backend=self.backend, plan=self._plan.digest, state=self._state)

    def remove(self) -> None:
        """Leave the host as it was."""
        self._undo(self._ruleset.backend.remove, routing.uninstall)

    @property
    def _opens(self) -> bool:
        """True if the ruleset goes when the relay dies."""
        return self._plan.on_failure == "open" or self._state == "draining"

    @property
    def _closes(self) -> bool:
        """True if it changes then: iptables drops what it has no listener for, and a refusal takes other rules."""
        return not (self._opens or self._ruleset.backend.refuses_without_listener) and self._plan.mode == "tproxy"

    def relay_died(self) -> None:
        """What `on-failure` says."""
        if self._opens:
            self.remove()
        elif self._closes:
            self._undo(lambda: self._ruleset.change("closed"), routing.uninstall)

    def _undo(self, *steps: Callable[[], object]) -> None:
        for step in steps:
            try:
                step()
            except RelayError as error:
                self.tell("trouble", message=str(error))


def tell(talk: Channel, event: str, **fields: Any) -> None:
    """A message to the relay, whose words are cut where they are too many."""
    words = {name: value[:MAX_WORDS] if isinstance(value, str) else value for name, value in fields.items()}
    talk.send({"event": event, **words})


def receive(talk: Channel) -> tuple[Message, list[int]] | None:
    """The next message; what is none is an order that nobody knows."""
    try:
        return talk.receive()
    except ValueError:
        return {}, []


def _do_not_know(message: Message, _: list[int]) -> None:
    """The other end may be a relay of a later version, to which this guard was handed over."""
    raise RelayError(f"the guard of the ruleset does not know the order {message.get('order')!r}: restart the relay")


def understood(message: Message) -> Plan:
    """The plan of a message, which may come from another version of the program."""
    try:
        if message.get("state", "active") not in STATES or type(message["pid"]) is not int:
            raise ValueError
        return plans.from_json(message["plan"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RelayError(
            "the guard of the ruleset is of another version and does not understand this plan: restart the relay"
        ) from error


def put_nothing_at(fd: int) -> None:
    """Open /dev/null at a descriptor, in the place of what was there."""
    with open(os.devnull, "r+b", buffering=0) as nothing:
        os.dup2(nothing.fileno(), fd)
