"""A generation of workers comes, and the one before goes: at the start, at a reload, when another relay is taken over.

The new workers are started beside the old ones. When all of them are ready, the ruleset leads to them and they take
the clients; the old ones finish their connections. Until then nothing has changed, and a reload can be refused.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import fields

from tproxy_relay.errors import ConfigError, RelayError
from tproxy_relay.guard.guard_client import Interception
from tproxy_relay.logs.sink import Sink
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.net import listeners
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import takeover_client
from tproxy_relay.supervisor.generation import Generation, fixed, prepare
from tproxy_relay.supervisor.respawn import Respawn
from tproxy_relay.supervisor.state import Phase, RelayState
from tproxy_relay.supervisor.status import Status
from tproxy_relay.supervisor.takeover_client import Offer
from tproxy_relay.supervisor.worker_process import Stage, WorkerProcess
from tproxy_relay.supervisor.workers import last_clients
from tproxy_relay.system import systemd

LEAVE_TIMEOUT = 2.0
"""Seconds for workers that are told to take no more clients to have heard of it; it takes some milliseconds."""

log = logging.getLogger(__name__)


class Rollout:
    """At most one at a time."""

    def __init__(
        self,
        state: RelayState,
        respawn: Respawn,
        status: Status,
        writer: LogWriter,
        reread: Callable[[], Settings],
    ) -> None:
        """`reread` reads the configuration again; it raises RelayError."""
        self.requested = False
        """A reload was asked for, and has not begun."""
        self._state = state
        self._respawn = respawn
        self._status = status
        self._writer = writer
        self._reread = reread
        self._last_number = 0
        self._offer: Offer | None = None
        self._rising: Generation | None = None
        self._retiring: Generation | None = None
        self._retired_by = 0.0
        self._sink: Sink | None = None

    # --- a generation comes

    def begin(self, first: Generation, offer: Offer | None) -> None:
        """Start the first generation; it takes over what another relay offers. Raises RelayError."""
        self._offer = offer
        self._start_generation(first)

    def reload(self) -> None:
        """Read the configuration again, and start a generation that obeys it."""
        self.requested = False
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", self._state.environ)
        try:
            prepared = self._prepare(self._state.generation)
        except RelayError as error:
            self._refuse_reload(error)
            return
        try:
            self._state.phase = Phase.ROLLING_OUT
            self._start_generation(prepared)
        except RelayError as error:
            self.give_up(error)

    def _prepare(self, before: Generation) -> Generation:
        settings = self._reread()
        refuse_unchangeable(before.settings, settings)
        self._sink = self._writer.open(settings)
        number, inherited = self._last_number + 1, self._state.inherited
        try:
            return prepare(settings, before.listeners, number=number, inherited=inherited)
        except BaseException:
            self._sink.close()
            raise

    def _start_generation(self, generation: Generation) -> None:
        """Its workers wait until all of them are ready."""
        self._last_number = generation.number
        self._rising = generation
        for _ in range(generation.pool.size):
            self._state.workers.start(generation)

    def is_rising(self, worker: WorkerProcess) -> bool:
        """True for a worker of the generation that is not in force yet."""
        return self._rising is not None and worker.generation == self._rising.number

    def on_worker_ready(self, worker: WorkerProcess) -> None:
        """Put its generation in force if it is the last one of it that was awaited; let it serve if it stands in for
        one that has died. Raises RelayError at the start, if that fails."""
        if self._rising is None or not self.is_rising(worker):
            worker.serve()
            return
        fresh = self._state.workers.of(self._rising)
        if all(one.stage is Stage.READY for one in fresh):
            try:
                self._promote(self._rising, fresh)
            except RelayError as error:
                self.give_up(error)

    def _promote(self, generation: Generation, fresh: Sequence[WorkerProcess]) -> None:
        """The new generation takes over: the ruleset leads to it, and it accepts what has come meanwhile."""
        before, offer = self._state.current, self._offer
        if offer is None:
            self._change_ruleset(generation)
        else:
            self._state.interception = takeover_client.take_over(offer, generation)
            offer.close()
            generation.tune()  # not before: they are the other one's as well
            self._offer = None
        for worker in fresh:
            worker.serve()
        self._state.current, self._rising = generation, None
        self._respawn.cancel()  # it is complete
        if before is None:
            self._state.phase = Phase.RUNNING
        else:
            self._retire(before, generation)

    def _change_ruleset(self, generation: Generation) -> None:
        """Have it as these settings want it. Raises RelayError, with the one before in force."""
        interception = self._state.interception
        if generation.plan is None:
            if interception is not None:
                raise ConfigError("live connections need the ruleset, so a reload cannot end interception; restart")
        elif interception is None:
            interception = Interception(generation.plan, generation.settings.backend)
            interception.install()
            self._state.interception = interception
        else:
            interception.replace(generation.plan)

    # --- or not

    def give_up(self, error: RelayError) -> None:
        """The new generation cannot be put in force. At the start that is the end: raises the error."""
        rising, self._rising = self._rising, None
        current = self._state.current
        if current is None or rising is None:
            raise error
        self._state.workers.dismiss(self._state.workers.of(rising))
        if self._sink is not None:
            self._sink.close()
        listeners.close_all([one for one in rising.listeners if one not in current.listeners])
        self._refuse_reload(error)

    def _refuse_reload(self, error: RelayError) -> None:
        self._state.phase = Phase.RUNNING
        self._state.reloads_refused += 1
        log.error("reload refused", extra={"why": str(error)})
        self.notify_ready([])

    # --- the one before goes

    def _retire(self, before: Generation, after: Generation) -> None:
        """Have the workers of that generation finish what they have. Clients that come in the same moment may still be
        theirs, so the reload is done when all of them have heard of it."""
        gone = [one for one in before.listeners if one not in after.listeners]
        for worker in self._state.workers.of(before):
            worker.leave(*last_clients(gone), None)
        listeners.close_all(list(gone))
        after.tune()
        self._retiring, self._retired_by = before, time.monotonic() + LEAVE_TIMEOUT

    @property
    def deadline(self) -> float | None:
        """Until when `tick` waits for workers that leave (time.monotonic()); None: there are none."""
        return None if self._retiring is None else self._retired_by

    def tick(self, now: float) -> None:
        """Finish the rollout once the workers of the generation before take no more clients; `now` is
        time.monotonic()."""
        if self._retiring is None:
            return
        workers = self._state.workers.of(self._retiring)
        if now < self._retired_by and any(worker.stage is not Stage.LEFT for worker in workers):
            return
        before, self._retiring = self._retiring, None
        self._finish(before, self._state.generation)

    def _finish(self, before: Generation, after: Generation) -> None:
        names = changed(before.settings, after.settings)
        assert self._sink is not None
        try:
            self._writer.change(self._sink)
        except RelayError as error:
            log.error("%s; the log goes on as before", error)
        if self._state.inherited and {"bind", "ports"} & set(names):
            log.warning("bind and ports change nothing: the listeners were passed on to this relay")
        self._state.phase = Phase.RUNNING
        self._status.follow_settings()
        self._state.reloads += 1
        self.notify_ready([one.stored_name for one in before.listeners if one not in after.listeners])
        log.info(
            "reloaded",
            extra={"generation": after.number, "workers": after.pool.size, "changed": ", ".join(names)},
        )

    def notify_ready(self, forgotten: Sequence[str]) -> None:
        """Tell the service manager, which keeps the listeners open while this relay is started again (FDSTORE of
        sd_notify(3)), and no longer those of these names; those of a socket unit it keeps anyway."""
        generation, environ = self._state.generation, self._state.environ
        # First, as a manager that is slow has room for a few messages only (net.unix.max_dgram_qlen).
        systemd.notify(f"READY=1\nSTATUS=relaying with {generation.pool.size} workers", environ)
        if not self._state.inherited:
            for name in forgotten:
                systemd.notify(f"FDSTOREREMOVE=1\nFDNAME={name}", environ)
            for listener in generation.listeners:
                systemd.notify(f"FDSTORE=1\nFDNAME={listener.stored_name}", environ, [listener.sock.fileno()])

    def close(self) -> None:
        """The relay takes no new connections: close all listeners, and end a generation that is not in force yet."""
        self._retiring = None
        for generation in (self._rising, self._state.current):
            if generation is not None:
                listeners.close_all(list(generation.listeners))
        if self._rising is not None:
            self._state.workers.dismiss(self._state.workers.of(self._rising))
            self._rising = None


def changed(before: Settings, after: Settings) -> list[str]:
    """The names of the options that are not as they were."""
    names = (field.name for field in fields(Settings))
    return [name.replace("_", "-") for name in names if getattr(before, name) != getattr(after, name)]


def refuse_unchangeable(before: Settings, after: Settings) -> None:
    """Raises ConfigError if a reload would have to change what live connections depend on."""
    now, then = fixed(before), fixed(after)
    names = [name for name in now if now[name] != then[name]]
    if names:
        raise ConfigError(f"{', '.join(names)}: live connections depend on it, so a reload cannot change it; restart")
