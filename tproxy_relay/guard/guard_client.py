"""The relay's end of the guard: have the ruleset installed, replaced, drained and removed, and hear what it tells.

A thread listens. If the guard itself dies, the thread starts another one, which puts the rules back in the state that
they should have by then. A guard can also be handed over to the relay that takes this one's place. It still tells this
one, which finishes its transfers, when the other one leaves.
"""

import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tproxy_relay import errors
from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import ruleset
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel, Message

PATIENCE = 3.0
"""Seconds to wait for the guard to have drained or removed the rules; it takes a twentieth of one. Nothing else is
done meanwhile."""
INSTALL_TIMEOUT = 60.0
"""Seconds for the guard to install them: it runs some programs, which may wait for another program's lock."""
MIN_LIFE = 1.0
"""Seconds between two starts of a guard that does not live."""

Reached = Literal["active", "draining", "lingering", "removed", "gone"]

log = logging.getLogger(__name__)


class Health(NamedTuple):
    """The ruleset as its guard sees it."""

    state: Reached | None
    """None before it is installed; lingering: the guard keeps it for a relay before this one; gone: nobody guards
    it, or another relay has it."""
    backend: str | None
    plan: str
    """The plan's digest."""
    trouble: str | None
    """What could not be done, until it can."""


class Interception:
    """The ruleset of a running relay. Its methods are for the main thread."""

    def __init__(self, plan: Plan, backend: str, talk: Channel | None = None) -> None:
        """With `talk` the guard is there already, and another relay hands it over."""
        self._plan = plan
        self._backend = backend
        self._changed = threading.Condition()
        self._wanted: State = "active"
        self._reached: Reached | None = None
        self._failure: RelayError | None = None
        self._asked: Plan | None = None
        self._answer: Message | None = None
        self._chosen: str | None = None
        self._trouble: str | None = None
        self._ending = False
        self._handed_over = self._orphaned = False
        self._stderr = [2] if talk and sys.__stderr__ else []
        """For the guard, in the place of the other relay's."""
        self._started_at = time.monotonic()
        self._guard: subprocess.Popen[bytes] | None = None
        """None if another relay has started it."""
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
        threading.Thread(target=self._hear, name="guard", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._reached, INSTALL_TIMEOUT)
            if self._reached not in ("active", "draining"):
                self._ending = True
                raise self._failure or RelayError("the guard of the ruleset has not installed it")

    def replace(self, plan: Plan) -> None:
        """Have another plan in the place of this one, while connections go on. Raises what kept it from that; then
        this one is still in force."""
        with self._changed:
            self._asked, self._answer = plan, None
            try:
                if not _say(self._talk, self._order_to_replace(plan), *self._stderr):
                    raise RelayError("the guard of the ruleset has died, try again")
                self._stderr = []
                self._changed.wait_for(lambda: self._answer, INSTALL_TIMEOUT)
                _check(self._answer)
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
            _say(self._talk, {"order": "drain"})  # if it is dead, the next one begins with draining
            done = self._changed.wait_for(lambda: self._reached in ("draining", "gone"), PATIENCE)
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
            _say(self._talk, {"order": "remove"})
            self._changed.wait_for(lambda: self._reached in ("lingering", "removed", "gone"), PATIENCE)
        if self._reached == "lingering":
            log.info("ruleset stays until the relay before this one has ended")
        elif self._reached == "removed" or self._remove_without_guard():
            log.info("ruleset removed")
            if guard is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    guard.wait(MIN_LIFE)  # it has nothing more to do

    def hand_over(self, fd: int, pid: int) -> None:
        """Leave the guard to the relay with this process id, which has the other end of that channel, and which starts
        another one if this has just died. The descriptor stays the caller's, to be closed. The ruleset is no longer
        this relay's matter."""
        with self._changed:
            _say(self._talk, {"order": "serve", "pid": pid}, fd)
            self._handed_over = True
            self._reached = "gone"
            self._changed.notify_all()

    @property
    def health(self) -> Health:
        """As far as it is known."""
        with self._changed:
            return Health(self._reached, self._chosen, self._plan.digest, self._trouble)

    def _remove_without_guard(self) -> bool:
        try:
            ruleset.remove()
            return True
        except RelayError as error:
            log.error("the ruleset could not be removed: %s; try `tproxy-relay rules remove`", error)
            return False

    def _start_guard(self) -> Channel:
        package = Path(__file__).parents[2]
        path = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._started_at = time.monotonic()
        try:
            talk, theirs = channel.pair()
        except OSError as error:
            raise SystemRefusedError(f"cannot start the guard of the ruleset: {error.strerror}") from error
        try:
            self._guard = subprocess.Popen(
                [sys.executable, "-m", "tproxy_relay.guard"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # Neither Ctrl-C nor the folder it was started in is the guard's.
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        except OSError as error:
            talk.close()
            raise SystemRefusedError(f"cannot start the guard of the ruleset: {error.strerror}") from error
        finally:
            theirs.close()
        plan = plans.to_json(self._plan)
        try:
            _say(talk, {"plan": plan, "backend": self._backend, "state": self._wanted, "pid": os.getpid()})
        except RelayError:
            talk.close()
            raise
        return talk

    def _order_to_replace(self, plan: Plan) -> Message:
        return {"order": "replace", "plan": plans.to_json(plan), "state": self._wanted, "pid": os.getpid()}

    def _hear(self) -> None:
        """In its own thread, for as long as the relay lives."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            while (told := _next(self._talk)) is not None:
                try:
                    self._take(told)
                except KeyError:
                    log.warning("the guard of the ruleset is of another version, and tells of %r", told["event"])
            if self._ends():
                return
            log.error("the guard of the ruleset has died, starting another one")
            self._replace_guard()

    def _ends(self) -> bool:
        """The guard is gone: True if that is as it should be."""
        with self._changed:
            if not (self._ending or self._handed_over or self._reached is None):
                return False
            self._forget_guard()
            self._reach("gone")
            return True

    def _replace_guard(self) -> None:
        """With a pause, if this one has not lived for long or cannot be started. The new one puts the rules back."""
        with self._changed:
            self._forget_guard()
            self._answered({"event": "refused", "message": "the guard of the ruleset has died", "exit_code": 1})
            while not self._changed.wait_for(self._is_done, self._started_at + MIN_LIFE - time.monotonic()):
                try:
                    self._talk = self._start_guard()
                    return
                except RelayError as error:
                    log.error("%s", error)

    def _is_done(self) -> bool:
        return self._ending or self._handed_over

    def _forget_guard(self) -> None:
        """One that was handed over lives on; the end of this process reaps it."""
        self._talk.close()
        if self._guard is not None and not self._handed_over:
            self._guard.wait()
            self._guard = None

    def _take(self, told: dict[str, Any]) -> None:
        event = told["event"]
        if self._handed_over:
            if event == "orphaned":
                self._drain_relay(at_once=told.get("at_once", False))
            return
        if event in ("trouble", "failed"):
            self._trouble = told["message"]
        elif event != "warning":
            self._trouble = None
        self._chosen = told.get("backend", self._chosen)
        if event == "installed" and self._reached is None:
            log.info("ruleset installed", extra={"backend": told["backend"], "plan": self._plan.digest})
        elif event == "installed":
            log.warning("ruleset restored", extra={"what": "the guard had died"})
        elif event == "serving":
            log.info("ruleset taken over", extra={"backend": told["backend"], "plan": told["plan"]})
        elif event == "restored":
            log.warning("ruleset restored", extra={"what": told["what"]})
        elif event == "warning":
            log.warning(told["message"])
        elif event == "failed" and self._reached is None:
            self._failure = errors.of_exit_code(told["exit_code"], told["message"])
        elif event in ("trouble", "failed"):
            log.error("the ruleset could not be changed: %s", told["message"])
        elif event in ("replaced", "refused"):
            self._answered(told)
        if "state" in told:
            if told["state"] == "removed" and self._guard is None:
                _await_end(told["pid"])  # no child of ours, which `remove` waits for
            self._reach(told["state"])

    def _drain_relay(self, *, at_once: bool) -> None:
        """The rules that know our last connections go with the relay that has them, or before they end."""
        if at_once:
            os.kill(os.getpid(), signal.SIGINT)
        elif not self._orphaned:
            self._orphaned = True
            os.kill(os.getpid(), signal.SIGTERM)

    def _answered(self, told: Message) -> None:
        with self._changed:
            if self._asked is not None and told.get("plan", self._asked.digest) == self._asked.digest:
                self._answer = told
                self._changed.notify_all()
            elif told["event"] == "replaced" and told["plan"] != self._plan.digest:
                _say(self._talk, self._order_to_replace(self._plan))  # so late that nobody wants it any more

    def _reach(self, state: Reached) -> None:
        with self._changed:
            if state != "gone" or self._reached not in ("lingering", "removed"):
                self._reached = state
            self._changed.notify_all()


def _say(talk: Channel, message: Message, *descriptors: int) -> bool:
    """False if the guard has died; then the thread that listens to it sees its end."""
    try:
        return talk.send(message, descriptors)
    except ValueError as error:
        raise RelayError("the plan of the ruleset is too long for its guard: name fewer ranges of ports") from error


def _next(talk: Channel) -> Message | None:
    """What the guard tells next; None at its end."""
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


def _await_end(pid: int) -> None:
    """Of a guard that has nothing more to do."""
    try:
        guard = os.pidfd_open(pid)
    except OSError:
        return  # it has ended
    ended = select.poll()
    ended.register(guard, select.POLLIN)
    ended.poll(MIN_LIFE * 1000)
    os.close(guard)


def _check(answer: Message | None) -> None:
    """Raise what kept the guard from replacing the plan."""
    if answer is None:
        raise RelayError(f"the guard of the ruleset did not answer within {INSTALL_TIMEOUT:g} s")
    if answer["event"] != "replaced":
        raise errors.of_exit_code(answer["exit_code"], answer["message"])
