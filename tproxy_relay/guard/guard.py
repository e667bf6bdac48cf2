"""The guard: installs the ruleset, watches over it, and undoes it when the relay is gone, however it went.

It talks to the relay's supervisor over a channel (channel.py), whose end the kernel tells of a process that was killed,
too; messages.py has what is said on it. It answers each order, and says without being asked when it had to put the
rules back.

A supervisor that was followed by another one finishes its transfers, and packets of those need the rules, too. So the
guard keeps its channel, says `orphaned` when the last supervisor leaves, and lingers with rules that take nothing new
until the process is gone. If somebody else wants to have the ruleset meanwhile, it lingers no longer.
"""

import math
import os
import selectors
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from tproxy_relay.errors import RelayError
from tproxy_relay.guard import messages
from tproxy_relay.guard.formers import Formers
from tproxy_relay.guard.netlink import Changes
from tproxy_relay.guard.surroundings import Surroundings
from tproxy_relay.intercept import backends, routing
from tproxy_relay.intercept.backend import Backend
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.intercept.nft_owner import NftOwner
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.programs import ProgramError
from tproxy_relay.intercept.ruleset import Ruleset
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel, Message

SETTLE = 0.2
"""Seconds after a change before the rules are checked: changes come in bursts."""
CHECK_INTERVAL = 2.0
"""Seconds between two checks at the least, and at the most where nobody reports changes."""
SLOW_CHECK_INTERVAL = 30.0
"""Seconds between two checks where changes are reported: routes and interfaces are not."""

CLOSED_TIMEOUT = 10.0
"""Seconds for former relays where rules that refuse must take the place of those that know their connections: until
then new ones get no answer."""

_FORMER, _RELAY, _LOCK, _CHANGES, _OWNER = range(5)
"""Whose turn it is first when several have something to say: who is gone is known before others are answered."""


class _Source(NamedTuple):
    """What the selector knows of a descriptor."""

    turn: int
    handle: Callable[[], None]


class Guard:
    """The ruleset of one relay, from its installation to its end."""

    def __init__(self, talk: Channel, start: messages.Start) -> None:
        """Install it. Raises RelayError if that cannot be done; then all is as it was."""
        self._talk = talk
        self._pid = start.pid
        self._state: State = start.state
        self._owner: NftOwner | None = None
        self._in_trouble = False
        self._formers = Formers()
        self._last_step: Callable[[], None] | None = None
        self._until = math.inf
        self._orders: dict[str, Callable[[Message, list[int]], None]] = {
            messages.Drain.NAME: lambda *_: self._drain_all(),
            messages.Remove.NAME: lambda *_: self._leave(self.remove),
            messages.Replace.NAME: self._replace,
            messages.Serve.NAME: self._serve,
        }
        self._lock = Lock()
        self._selector = selectors.DefaultSelector()
        hold = start.plan.on_failure == "open"
        chosen = backends.choose(
            start.backend, start.plan, hold=hold, warn=lambda line: self.send(messages.Warned(line))
        )
        self._changes = Changes(nftables=chosen.reports_changes)
        self._surroundings = Surroundings(self._changes, self.send)
        self._ruleset = _install(start.plan, chosen, start.state)
        self._checked_at = time.monotonic()
        self._check_at = self._checked_at + self._interval

    @property
    def backend(self) -> str:
        """The name of the backend that has the rules: nft, iptables-nft, iptables-legacy or iptables."""
        return self._ruleset.backend.name

    @property
    def _plan(self) -> Plan:
        return self._ruleset.plan

    @property
    def _interval(self) -> float:
        return SLOW_CHECK_INTERVAL if self._changes.complete else CHECK_INTERVAL

    def send(self, event: messages.Event) -> None:
        """An event for the relay; after the relay's death nobody is left to read it."""
        messages.send_event(self._talk, event)

    def watch(self) -> None:
        """Until nobody needs the ruleset any more. Then it is removed, or does what `on-failure` says."""
        self._register(self._talk, _RELAY, self._on_order)
        self._register(self._lock, _LOCK, self._on_question)
        for sock in self._changes.sockets:
            self._register(sock, _CHANGES, self._on_change)
        self._watch_owner()
        while self._last_step is None or self._formers and time.monotonic() < self._until:
            self._handle_ready()
            if time.monotonic() >= self._check_at:
                self._check()
            if time.monotonic() >= self._surroundings.look_at:
                self._surroundings.look(self._ruleset.backend)
        self._formers.part()
        self._last_step()
        self._lock.close()
        self.send(messages.Changed("removed", os.getpid()))

    def _register(self, one: Channel | Lock | NftOwner | socket.socket, turn: int, handle: Callable[[], None]) -> None:
        self._selector.register(one, selectors.EVENT_READ, _Source(turn, handle))

    def _handle_ready(self) -> None:
        wake_at = min(self._check_at, self._until, self._surroundings.look_at)
        ready = [key for key, _ in self._selector.select(max(0.0, wake_at - time.monotonic()))]
        for key in sorted(ready, key=lambda key: key.data.turn):
            if self._selector.get_map().get(key.fd) is key:  # what came before it may have let go of it
                key.data.handle()

    def _on_order(self) -> None:
        received = messages.receive_order(self._talk)
        if received is not None:
            self._handle_order(*received)
            return
        self._selector.unregister(self._talk)
        self._talk.close()
        if self._last_step is None:
            self._leave(self.remove if self._opens else self.relay_died)

    def _handle_order(self, message: Message, descriptors: list[int]) -> None:
        handle = self._orders.get(str(message.get("order")), _refuse)
        try:
            handle(message, descriptors)
        except RelayError as error:
            self.send(messages.Refused(str(error), error.exit_code))
        finally:
            for fd in descriptors:  # those that nobody wanted
                os.close(fd)

    def _on_question(self) -> None:
        if self._lock.answer(self._pid, lingers=self._last_step is not None):
            self._until = 0.0

    def _on_change(self) -> None:
        if self._surroundings.read():
            self._check_soon()

    def _on_owner_output(self) -> None:
        assert self._owner is not None
        if self._owner.has_ended():
            self._own_again()

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
            self.send(messages.Changed("lingering"))
        elif self._closes:
            self._until = time.monotonic() + CLOSED_TIMEOUT
        self._formers.send_orphaned()
        if last_step != self.remove and not self._closes:
            self._formers.leave()  # the rules stay

    def _on_former(self, former: Channel) -> None:
        if not self._formers.receive(former):
            self._selector.unregister(former)
            former.close()

    def _watch_owner(self) -> None:
        if self._owner is not None:
            self._selector.unregister(self._owner)
        self._owner = self._ruleset.backend.owner
        if self._owner is not None:
            self._register(self._owner, _OWNER, self._on_owner_output)

    def _own_again(self) -> None:
        """The owner has ended, and its table is gone: at once, because the servers now get packets of relayed
        connections, and reset them."""
        try:
            self._ruleset.backend.install(self._plan, self._state)
            self.send(messages.Restored("the process that held the table had died", self._state))
        except RelayError as error:
            self._trouble(error)
        self._watch_owner()
        self._check_soon()

    def _check_soon(self) -> None:
        soon = max(time.monotonic() + SETTLE, self._checked_at + CHECK_INTERVAL)
        self._check_at = min(self._check_at, soon)

    def _check(self) -> None:
        """Compare the kernel with the plan, and put back what is gone."""
        interval = self._interval
        try:
            self._surroundings.read()  # what has come is what is checked now
            restored = self._ruleset.restore(self._state)
            if restored:
                self.send(messages.Restored("; ".join(restored), self._state))
            elif self._in_trouble:
                self.send(messages.Well())
            self._in_trouble = False
            if self._ruleset.backend.owner is not self._owner:
                self._watch_owner()
        except RelayError as error:
            interval = CHECK_INTERVAL
            self._trouble(error)
        self._surroundings.tell()
        self._checked_at = time.monotonic()
        self._check_at = self._checked_at + interval

    def _trouble(self, error: RelayError) -> None:
        self._in_trouble = True
        self.send(messages.Trouble(str(error)))

    def _drain_all(self) -> None:
        self._drain()
        self._formers.send_orphaned()

    def _drain(self) -> None:
        try:
            self._state = "draining"
            self._ruleset.change("draining")
            self.send(messages.Changed("draining"))
        except RelayError as error:
            self._trouble(error)
            self._check_soon()

    def _replace(self, message: Message, descriptors: list[int]) -> None:
        """Another plan, for the same relay or for one that has taken it over. That one brings its standard error, so
        that who reads the first one's sees its end."""
        for fd in descriptors[:1]:
            os.dup2(fd, 2)
        order = messages.replace_of(message)
        plan, state = order.plan, order.state or self._state
        try:
            if (plan, state) != (self._plan, self._state):
                self._ruleset.replace(plan, self._state, state)
            self._state, self._pid = state, order.pid
        except RelayError:
            self._check_soon()
            raise
        finally:
            if self._ruleset.backend.owner is not self._owner:
                self._watch_owner()
        self.send(messages.Replaced(plan.digest, state))

    def _serve(self, message: Message, descriptors: list[int]) -> None:
        """Another supervisor takes the place of this one, which is a former one from now on."""
        order = messages.serve_of(message, descriptors)
        try:
            talk = channel.adopt(descriptors[0])
        except OSError as error:
            raise RelayError(f"the guard of the ruleset cannot talk to another relay: {error.strerror}") from error
        descriptors.clear()
        former, self._talk, self._pid = self._talk, talk, order.pid
        self._formers.add(former)
        self._selector.modify(former, selectors.EVENT_READ, _Source(_FORMER, partial(self._on_former, former)))
        self._register(talk, _RELAY, self._on_order)
        self.send(messages.Serving(self.backend, self._plan.digest, self._state))

    def remove(self) -> None:
        """Take the rules and the routing away; what cannot be taken away is trouble that is sent."""
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
        """Do with the rules what `on-failure` says: remove them, or leave rules that refuse new connections."""
        if self._opens:
            self.remove()
        elif self._closes:
            self._undo(lambda: self._ruleset.change("closed"), routing.uninstall)

    def _undo(self, *steps: Callable[[], object]) -> None:
        for step in steps:
            try:
                step()
            except RelayError as error:
                self.send(messages.Trouble(str(error)))


def _install(plan: Plan, chosen: Backend, state: State) -> Ruleset:
    """Held by a child, if the rules are to go with the relay and the kernel can do that."""
    ruleset = Ruleset(plan, chosen)
    try:
        ruleset.install(state)
    except ProgramError:
        if not (plan.on_failure == "open" and isinstance(chosen, Nft)):
            raise
        ruleset = Ruleset(plan, Nft())
        ruleset.install(state)
    return ruleset


def _refuse(message: Message, _: list[int]) -> None:
    """The other end may be a relay of a later version, to which this guard was handed over."""
    raise RelayError(f"the guard of the ruleset does not know the order {message.get('order')!r}: restart the relay")


def put_nothing_at(fd: int) -> None:
    """Open /dev/null at a descriptor, in the place of what was there."""
    with open(os.devnull, "r+b", buffering=0) as nothing:
        os.dup2(nothing.fileno(), fd)
