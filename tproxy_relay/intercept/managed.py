"""The relay's end of the guard: have the ruleset installed, drained and removed, and hear what the guard tells.

A thread listens. If the guard itself dies, the thread starts another one, which puts the rules back in the state that
they should have by then.
"""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tproxy_relay import errors
from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import ruleset
from tproxy_relay.intercept.plan import Plan, State

PATIENCE = 3.0
"""Seconds to wait for the guard to have drained or removed the rules; it takes a twentieth of one. Nothing else is
done meanwhile."""
INSTALL_PATIENCE = 60.0
"""Seconds for the guard to install them: it runs some programs, which may wait for another program's lock."""
LEAST_LIFE = 1.0
"""Seconds between two starts of a guard that does not live."""

Reached = Literal["active", "draining", "removed", "gone"]

log = logging.getLogger(__name__)


class Interception:
    """The ruleset of a running relay. Its methods are for the main thread."""

    def __init__(self, plan: Plan, backend: str) -> None:
        self._plan = plan
        self._backend = backend
        self._changed = threading.Condition()
        self._wanted: State = "active"
        self._reached: Reached | None = None
        self._failure: RelayError | None = None
        self._ending = False
        self._started_at = 0.0
        self._guard = self._start_guard()

    def install(self) -> None:
        """Have the ruleset installed. Raises what kept it from that."""
        threading.Thread(target=self._hear, name="guard", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._reached, INSTALL_PATIENCE)
            if self._reached != "active":
                self._ending = True
                raise self._failure or RelayError("the guard of the ruleset has not installed it")

    def drain(self) -> None:
        """From now on new connections go direct; the relayed ones go on."""
        with self._changed:
            self._wanted = "draining"
            _say(self._guard, "drain")  # if it is dead, the next one begins with draining
            done = self._changed.wait_for(lambda: self._reached in ("draining", "gone"), PATIENCE)
        if done and self._reached == "draining":
            log.info("ruleset draining")
        else:
            log.error("the ruleset still takes new connections: its guard does not answer")

    def remove(self) -> None:
        """Leave the host as it was."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            _say(self._guard, "remove")
            self._changed.wait_for(lambda: self._reached in ("removed", "gone"), PATIENCE)
        if self._reached == "removed" or self._remove_without_guard():
            log.info("ruleset removed")

    def _remove_without_guard(self) -> bool:
        try:
            ruleset.remove()
            return True
        except RelayError as error:
            log.error("the ruleset could not be removed: %s; try `tproxy-relay rules remove`", error)
            return False

    def _start_guard(self) -> "subprocess.Popen[bytes]":
        package = Path(__file__).parents[2]
        path = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._started_at = time.monotonic()
        try:
            guard = subprocess.Popen(
                [sys.executable, "-m", "tproxy_relay.intercept.guard"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Neither Ctrl-C nor the folder it was started in is the guard's.
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            )
        except OSError as error:
            raise SystemRefusedError(f"cannot start the guard of the ruleset: {error.strerror}") from error
        _say(guard, json.dumps({"plan": plans.to_json(self._plan), "backend": self._backend, "state": self._wanted}))
        return guard

    def _hear(self) -> None:
        """In its own thread, for as long as the relay lives."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            for told in _events(self._guard):
                self._take(told)
            if self._ending or self._reached is None:
                self._reach("gone")
                return
            log.error("the guard of the ruleset has died, starting another one")
            self._replace_guard()

    def _replace_guard(self) -> None:
        """With a pause, if this one has not lived for long or cannot be started. The new one puts the rules back."""
        with self._changed:
            _forget(self._guard)
            while not self._ending:
                self._changed.wait_for(lambda: self._ending, self._started_at + LEAST_LIFE - time.monotonic())
                try:
                    self._guard = self._start_guard()
                    return
                except SystemRefusedError as error:
                    log.error("%s", error)

    def _take(self, told: dict[str, Any]) -> None:
        event = told["event"]
        if event == "installed" and self._reached is None:
            log.info("ruleset installed", extra={"backend": told["backend"], "plan": self._plan.digest})
        elif event == "installed":
            log.warning("ruleset restored", extra={"what": "the guard had died"})
        elif event == "restored":
            log.warning("ruleset restored", extra={"what": told["what"]})
        elif event == "warning":
            log.warning(told["message"])
        elif event == "failed" and self._reached is None:
            self._failure = _error(told)
        elif event in ("trouble", "failed"):
            log.error("the ruleset could not be changed: %s", told["message"])
        if "state" in told:
            self._reach(told["state"])

    def _reach(self, state: Reached) -> None:
        with self._changed:
            if self._reached != "removed":
                self._reached = state
            self._changed.notify_all()


def _say(guard: "subprocess.Popen[bytes]", line: str) -> None:
    """It may have died; then the thread that listens to it sees its end."""
    assert guard.stdin is not None
    try:
        guard.stdin.write(line.encode() + b"\n")
        guard.stdin.flush()
    except (OSError, ValueError):  # ValueError: closed already, and there is no other one yet
        return


def _forget(dead: "subprocess.Popen[bytes]") -> None:
    for pipe in (dead.stdin, dead.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # an order that nobody has read
                pipe.close()
    dead.wait()


def _events(guard: "subprocess.Popen[bytes]") -> Iterator[dict[str, Any]]:
    """What it tells, to its end."""
    assert guard.stdout is not None
    for line in guard.stdout:
        yield json.loads(line)


def _error(told: dict[str, Any]) -> RelayError:
    """What the guard could not do, as if it had happened here."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, RelayError) and kind.exit_code == told["exit_code"]:
            return kind(told["message"])
    return RelayError(told["message"])
