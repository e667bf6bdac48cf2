"""The guard: a small process of its own that installs the ruleset, watches over it, and undoes it when the relay is
gone, however it went.

It learns of the relay's death from the end of its standard input, which the kernel closes for a process that was
killed, too. Signals that are meant for the relay's whole group (Ctrl-C, a service manager's TERM) do not concern it.

It reads lines: first the plan, the backend's name and the state as JSON, then `drain` and `remove`. It answers each
with a line of JSON, and tells without being asked when it had to put the rules back.
"""

import json
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import backends
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import routing
from tproxy_relay.intercept.backend import Backend
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.changes import Changes
from tproxy_relay.intercept.holder import Holder
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.programs import ProgramError
from tproxy_relay.intercept.ruleset import Ruleset

SETTLE = 0.2
"""Seconds after a change before the rules are looked at: changes come in bursts."""
LOOK_INTERVAL = 2.0
"""Seconds between two looks at the least, and at the most where nobody tells of changes."""
SLOW_INTERVAL = 30.0
"""Seconds between two looks where changes are told: routes and interfaces are not."""


class Guard:
    """The ruleset of one relay, from its installation to its end."""

    def __init__(self, plan: Plan, backend: str, state: State) -> None:
        self._plan = plan
        self._state: State = state
        self._holder: Holder | None = None
        self._lock = Lock()
        self._selector = selectors.DefaultSelector()
        hold = plan.on_failure == "open"
        chosen = backends.choose(backend, plan, hold=hold, warn=lambda line: tell("warning", message=line))
        self._changes = Changes(self._selector, nftables=chosen.tells_changes)
        self._ruleset = self._install(chosen)
        self._look_at = time.monotonic() + self._interval
        self._looked_at = time.monotonic()

    def _install(self, chosen: Backend) -> Ruleset:
        """Held by a child, if the rules are to go with the relay and the kernel can do that."""
        ruleset = Ruleset(self._plan, chosen)
        try:
            ruleset.install(self._state)
        except ProgramError:
            if not (self._plan.on_failure == "open" and isinstance(chosen, Nft)):
                raise
            ruleset = Ruleset(self._plan, Nft())
            ruleset.install(self._state)
        return ruleset

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self._ruleset.backend.name

    @property
    def _interval(self) -> float:
        return SLOW_INTERVAL if self._changes.complete else LOOK_INTERVAL

    def watch(self, lines: "Lines") -> bool:
        """Until the relay says `remove`, which returns True, or is gone, which returns False."""
        self._selector.register(lines, selectors.EVENT_READ)
        self._selector.register(self._lock, selectors.EVENT_READ)
        self._watch_holder()
        while True:
            patience = 0.0 if lines.waiting else max(0.0, self._look_at - time.monotonic())
            ready = [key.fileobj for key, _ in self._selector.select(patience)]
            if lines in ready or lines.waiting:
                for line in lines.read():
                    if line in ("", "remove"):
                        return line == "remove"
                    self._drain()
            if self._lock in ready:
                self._lock.answer(os.getppid())
            if self._changes.told(ready):
                self._look_soon()
            if self._holder in ready and self._holder.has_ended():
                self._hold_again()
            if time.monotonic() >= self._look_at:
                self._look()

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
            tell("restored", what="the process that held the table had died", state=self._state)
        except RelayError as error:
            tell("trouble", message=str(error))
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
                tell("restored", what="; ".join(restored), state=self._state)
            if self._ruleset.backend.holder is not self._holder:
                self._watch_holder()
        except RelayError as error:
            interval = LOOK_INTERVAL
            tell("trouble", message=str(error))
        self._looked_at = time.monotonic()
        self._look_at = self._looked_at + interval

    def _drain(self) -> None:
        try:
            self._state = "draining"
            self._ruleset.change("draining")
            tell("changed", state="draining")
        except RelayError as error:
            tell("trouble", message=str(error))
            self._look_soon()

    def remove(self) -> None:
        """Leave the host as it was."""
        self._undo(self._ruleset.backend.remove, routing.uninstall)

    def relay_died(self) -> None:
        """What `on-failure` says."""
        if self._plan.on_failure == "open" or self._state == "draining":
            self.remove()
        elif not self._ruleset.backend.refuses_without_listener and self._plan.mode == "tproxy":
            # iptables drops what it has no listener for; a refusal takes other rules.
            self._undo(lambda: self._ruleset.change("closed"), routing.uninstall)

    @staticmethod
    def _undo(*steps: Callable[[], object]) -> None:
        for step in steps:
            try:
                step()
            except RelayError as error:
                tell("trouble", message=str(error))


class Lines:
    """Standard input by lines, without a buffer that select() cannot see."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self._waiting: list[str] = []

    def fileno(self) -> int:
        """The descriptor to watch."""
        return self._fd

    def read(self) -> list[str]:
        """The lines that are there; an empty one is the end. Waits if there is nothing."""
        if self._waiting:
            lines, self._waiting = self._waiting, []
            return lines
        chunk = os.read(self._fd, 65536)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode() for line in whole if line] + ([] if chunk else [""])

    def first(self) -> str:
        """Wait for one line; '' if the end comes before it."""
        while not (lines := self.read()):
            continue
        first, *self._waiting = lines
        return first

    @property
    def waiting(self) -> bool:
        """True if there are lines that select() does not know of."""
        return bool(self._waiting)


def tell(event: str, **fields: object) -> None:
    """A line to the relay; nobody is left to hear it after the relay's death."""
    try:
        os.write(1, (json.dumps({"event": event, **fields}) + "\n").encode())
    except OSError:
        return


def main() -> int:
    """The process. The relay starts it; by hand it is of no use."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a relay that is PID 1 ignores it, and exit codes would be lost
    lines = Lines(0)
    order = lines.first()
    if not order:
        return 0
    try:
        request = json.loads(order)
        guard = Guard(plans.from_json(request["plan"]), request["backend"], request["state"])
    except RelayError as error:
        tell("failed", message=str(error), exit_code=error.exit_code)
        return error.exit_code
    tell("installed", backend=guard.backend, state=request["state"])
    try:
        ordered = guard.watch(lines)
    except BaseException:
        guard.relay_died()
        raise
    if ordered:
        guard.remove()
        tell("changed", state="removed")
    else:
        guard.relay_died()
    return 0


if __name__ == "__main__":
    sys.exit(main())
