"""The relay's end of the guard: have the ruleset installed, replaced, drained and removed, and receive what the guard
says of it.

A thread receives. If the guard itself dies, the thread starts another one, which puts the rules back in the state that
they should have by then. A guard can also be handed over to the relay that takes this one's place. It still tells this
one, which finishes its transfers, when the other one leaves.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from tproxy_relay import errors
from tproxy_relay.errors import RelayError
from tproxy_relay.guard import guard_process, messages
from tproxy_relay.guard.guard_log import GuardLog
from tproxy_relay.guard.messages import Event, Refused, Replaced
from tproxy_relay.guard.reports import Reports
from tproxy_relay.intercept import ruleset
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.ipc.channel import Channel

ORDER_TIMEOUT = 3.0
"""Seconds to wait for the guard to have drained or removed the rules; it takes a twentieth of one. Nothing else is
done meanwhile."""
INSTALL_TIMEOUT = 60.0
"""Seconds for the guard to install them: it runs some programs, which may wait for another program's lock."""
RESTART_INTERVAL = 1.0
"""Seconds between two starts of a guard that does not live."""

log = logging.getLogger(__name__)


class Health(NamedTuple):
    """The ruleset as its guard sees it."""

    state: str | None
    """active, draining or removed; None: not installed yet; lingering: the guard keeps it for a relay before this one;
    gone: nobody guards it, or another relay has it."""
    backend: str | None
    plan: str
    """The plan's digest."""
    trouble: str | None
    """What could not be done, until it can."""


_AFTER_TROUBLE = (
    *(messages.Trouble, messages.Failed, messages.Warned),
    *(messages.HostChanged, messages.Counted),  # which say nothing of the rules
)
"""Events after which there may be trouble; after any other one there is none."""


class Interception:
    """The ruleset of a running relay. Its methods are for the main thread."""

    def __init__(self, plan: Plan, backend: str, talk: Channel | None = None) -> None:
        """With `talk` the guard is there already, and another relay hands it over."""
        self._plan = plan
        self._backend = backend
        self._changed = threading.Condition()
        self._wanted: State = "active"
        self._reached: str | None = None
        self._failure: RelayError | None = None
        self._asked: Plan | None = None
        self._answer: Replaced | Refused | None = None
        self._chosen: str | None = None
        self._trouble: str | None = None
        self.reports, self._log = Reports(None if talk else messages.Counted()), GuardLog()
        self._ending = self._handed_over = self._orphaned = False
        self._stderr = [2] if talk and sys.__stderr__ else []
        """For the guard, in the place of the other relay's."""
        self._started_at = time.monotonic()
        self._guard: subprocess.Popen[bytes] | None = None
        """None if another relay has started it."""
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            messages.Installed: self._on_installed,
            messages.Failed: self._on_failed,
            messages.Restored: self._on_restored,
            messages.Trouble: self._on_trouble,
            messages.Changed: self._on_changed,
            Replaced: self._on_replaced,
            Refused: self._on_refused,
            messages.Serving: self._on_serving,
            **dict.fromkeys((messages.Well, messages.Orphaned), lambda _: None),  # the latter: for one that handed over
            **dict.fromkeys((messages.HostChanged, messages.Counted), self.reports.take),
            messages.Warned: lambda event: self._log.warned(event.message),
            messages.Unknown: self._on_unknown,
        }
        self._talk = talk or self._start_guard()

    @classmethod
    def take_over(cls, talk: Channel, plan: Plan, backend: str) -> "Interception":
        """The ruleset of a relay that hands it over to this one, by sending the other end of this channel to its guard
        (`hand_over`). Until `replace` its plan stays in force; a guard that dies is replaced by one with this plan."""
        taken = cls(plan, backend, talk)
        try:
            taken.install()
        except RelayError as error:
            log.error("the guard of the ruleset was not handed over, starting another one: %s", error)
            taken = cls(plan, backend)
            taken.install()
        return taken

    def install(self) -> None:
        """Have the ruleset installed. Raises what kept it from that."""
        threading.Thread(target=self._receive, name="guard", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._reached, INSTALL_TIMEOUT)
            if self._reached not in ("active", "draining"):
                self._ending = True
                raise self._failure or RelayError("the guard of the ruleset has not installed it")

    def replace(self, plan: Plan, timeout: float | None = None) -> None:
        """Have another plan in the place of this one, while connections go on. Raises what kept it from that, as that
        it has taken so many seconds (None: INSTALL_TIMEOUT); then this one is still in force, or will be put back."""
        with self._changed:
            self._asked, self._answer = plan, None
            try:
                if not messages.send_order(self._talk, self._order_to_replace(plan), *self._stderr):
                    raise RelayError("the guard of the ruleset has died, try again")
                self._stderr = []
                self._changed.wait_for(lambda: self._answer, timeout or INSTALL_TIMEOUT)
                _check(self._answer, timeout or INSTALL_TIMEOUT)
            finally:
                self._asked = None
            self._plan = plan
        log.info("ruleset replaced", extra={"backend": self._chosen, "plan": plan.digest})

    def drain(self) -> None:
        """From now on new connections go direct; the relayed ones go on."""
        with self._changed:
            if self._handed_over:
                self._orphaned = True  # it drains, and need not be told
                return
            self._wanted = "draining"
            messages.send_order(self._talk, messages.Drain())  # if it is dead, the next one begins with draining
            done = self._changed.wait_for(lambda: self._reached in ("draining", "gone"), ORDER_TIMEOUT)
        if done and self._reached == "draining":
            log.info("ruleset draining")
        else:
            log.error("the ruleset still takes new connections: its guard does not answer")

    def remove(self) -> None:
        """Leave the host as it was, with no process of ours."""
        guard = self._guard
        with self._changed:
            if self._handed_over:
                return
            self._ending = True
            self._changed.notify_all()
            messages.send_order(self._talk, messages.Remove())
            self._changed.wait_for(lambda: self._reached in ("lingering", "removed", "gone"), ORDER_TIMEOUT)
        if self._reached == "lingering":
            log.info("ruleset stays until the relay before this one has ended")
        elif self._reached == "removed" or _remove_without_guard():
            log.info("ruleset removed")
            if guard is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guard.wait(guard_process.END_TIMEOUT)  # it has nothing more to do

    def hand_over(self, fd: int, pid: int) -> None:
        """Leave the guard to the relay with this process id, which has the other end of that channel, and which starts
        another one if this has just died. The descriptor stays the caller's, to be closed. The ruleset is no longer
        this relay's matter."""
        with self._changed:
            messages.send_order(self._talk, messages.Serve(pid), fd)
            self._handed_over = True
            self._reached = "gone"
            self._changed.notify_all()

    @property
    def health(self) -> Health:
        """The ruleset as far as it is known, from what the guard said last."""
        with self._changed:
            return Health(self._reached, self._chosen, self._plan.digest, self._trouble)

    def debug_state(self) -> dict[str, int]:
        """For tests: the descriptor of the channel to the guard."""
        return {"channel": self._talk.fileno()}

    def _start_guard(self) -> Channel:
        self._started_at = time.monotonic()
        order = messages.Start(self._plan, self._backend, self._wanted, os.getpid())
        self._guard, talk = guard_process.start(order)
        return talk

    def _order_to_replace(self, plan: Plan) -> messages.Replace:
        return messages.Replace(plan, self._wanted, os.getpid())

    def _receive(self) -> None:
        """In its own thread, for as long as the relay lives."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            while (message := messages.receive_event(self._talk)) is not None:
                try:
                    self._handle(messages.event_of(message))
                except KeyError:
                    log.warning("the guard of the ruleset is of another version, and tells of %r", message["event"])
            if self._ends():
                return
            self._replace_guard()

    def _ends(self) -> bool:
        """The guard is gone: True if that is as it should be."""
        with self._changed:
            if not (self._ending or self._handed_over or self._reached is None):
                return False
            self._forget_guard()
            self._set_reached("gone")
            return True

    def _replace_guard(self) -> None:
        """With a pause, if this one has not lived for long or cannot be started. The new one puts the rules back."""
        self._log.died()
        with self._changed:
            self._forget_guard()
            self._on_refused(Refused("the guard of the ruleset has died", 1))
            while not self._changed.wait_for(self._is_done, self._started_at + RESTART_INTERVAL - time.monotonic()):
                try:
                    self._talk = self._start_guard()
                    return
                except RelayError as error:
                    self._log.not_started(error)

    def _is_done(self) -> bool:
        return self._ending or self._handed_over

    def _forget_guard(self) -> None:
        """One that was handed over lives on; the end of this process reaps it."""
        self._talk.close()
        if self._guard is not None and not self._handed_over:
            self._guard.wait()
            self._guard = None

    def _handle(self, event: Event) -> None:
        if self._handed_over:
            if isinstance(event, messages.Orphaned):
                self._drain_relay(at_once=event.at_once)
            return
        if not isinstance(event, _AFTER_TROUBLE):
            self._trouble = None
            self._log.well()
        self._handlers[type(event)](event)

    def _on_installed(self, event: messages.Installed) -> None:
        self._chosen = event.backend
        if self._reached is None:
            log.info("ruleset installed", extra={"backend": event.backend, "plan": self._plan.digest})
        else:
            self._log.restored("the guard had died")
        self._set_reached(event.state)

    def _on_failed(self, event: messages.Failed) -> None:
        if self._reached is None:
            self._trouble = event.message
            self._failure = errors.of_exit_code(event.exit_code, event.message)
        else:
            self._on_trouble(event)

    def _on_trouble(self, event: messages.Trouble | messages.Failed) -> None:
        self._trouble = event.message
        self._log.in_trouble(event.message)

    def _on_restored(self, event: messages.Restored) -> None:
        self._log.restored(event.what)
        self._set_reached(event.state)

    def _on_serving(self, event: messages.Serving) -> None:
        self._chosen = event.backend
        log.info("ruleset taken over", extra={"backend": event.backend, "plan": event.plan})
        self._set_reached(event.state)

    def _on_changed(self, event: messages.Changed) -> None:
        if event.state == "removed" and event.pid is not None and self._guard is None:
            guard_process.await_end(event.pid)  # no child of ours, which `remove` waits for
        self._set_reached(event.state)

    def _on_unknown(self, event: messages.Unknown) -> None:
        self._chosen = event.backend or self._chosen
        if event.state is not None:
            self._on_changed(messages.Changed(event.state, event.pid))

    def _on_replaced(self, event: Replaced) -> None:
        with self._changed:
            if self._asked is not None and event.plan == self._asked.digest:
                self._set_answer(event)
            elif event.plan != self._plan.digest:  # so late that nobody wants it any more
                messages.send_order(self._talk, self._order_to_replace(self._plan))
        self._set_reached(event.state)

    def _on_refused(self, event: Refused) -> None:
        with self._changed:
            if self._asked is not None:
                self._set_answer(event)

    def _set_answer(self, event: Replaced | Refused) -> None:
        self._answer = event
        self._changed.notify_all()

    def _drain_relay(self, *, at_once: bool) -> None:
        """The rules that know our last connections go with the relay that has them, or before they end."""
        if at_once:
            os.kill(os.getpid(), signal.SIGINT)
        elif not self._orphaned:
            self._orphaned = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _set_reached(self, state: str) -> None:
        with self._changed:
            if state != "gone" or self._reached not in ("lingering", "removed"):
                self._reached = state
            self._changed.notify_all()


def _remove_without_guard() -> bool:
    """False if that did not work, which has been logged then."""
    try:
        ruleset.remove()
        return True
    except RelayError as error:
        log.error("the ruleset could not be removed: %s; try `tproxy-relay rules remove`", error)
        return False


def _check(answer: Replaced | Refused | None, timeout: float) -> None:
    """Raise what kept the guard from replacing the plan."""
    if answer is None:
        raise RelayError(f"the guard of the ruleset did not answer within {timeout:g} s")
    if isinstance(answer, Refused):
        raise errors.of_exit_code(answer.exit_code, answer.message)
