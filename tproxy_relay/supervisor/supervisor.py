"""The supervisor: it keeps the listeners, the ruleset and the workers, and touches no connection itself.

Its workers come in generations. The first one is started at the start, a new one at every reload; when all of a
new generation are ready, it takes the new clients, and the one before finishes its connections and ends. Everything
happens in one thread, whatever comes: a signal, a word or the end of a worker, another relay, or the time. The loop is
here; what is done then is done by managers: `rollout`, `respawn`, `shutdown`, `status`, `links`, `doctor` and
`takeover_server`.
"""

import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, MutableMapping, Sequence
from typing import Protocol

from tproxy_relay import __version__
from tproxy_relay.ipc.scoreboard import Scoreboard
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.net import listeners
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import takeover_client
from tproxy_relay.supervisor.doctor import Doctor
from tproxy_relay.supervisor.generation import Generation, prepare
from tproxy_relay.supervisor.health import Health
from tproxy_relay.supervisor.links import Links
from tproxy_relay.supervisor.respawn import Respawn
from tproxy_relay.supervisor.rollout import Rollout
from tproxy_relay.supervisor.shutdown import Shutdown
from tproxy_relay.supervisor.state import Phase, RelayState
from tproxy_relay.supervisor.status import Status
from tproxy_relay.supervisor.takeover_client import Offer
from tproxy_relay.supervisor.takeover_server import TakeoverServer
from tproxy_relay.supervisor.worker_process import Stage, WorkerEvent, WorkerProcess
from tproxy_relay.supervisor.workers import CHECK_INTERVAL, Workers
from tproxy_relay.system import reaper, systemd
from tproxy_relay.system.terminal import Terminal
from tproxy_relay.system.wakeup import Wakeup

log = logging.getLogger(__name__)


class Manager(Protocol):
    """One of those that the loop keeps the time for."""

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: not before something happens."""

    def tick(self, now: float) -> None:
        """Do what is due; `now` is time.monotonic(). It is called in every turn of the loop."""


class Heartbeat:
    """What is done every CHECK_INTERVAL seconds."""

    def __init__(self, state: RelayState, status: Status) -> None:
        self.deadline = time.monotonic() + CHECK_INTERVAL
        self._state = state
        self._status = status

    def tick(self, now: float) -> None:
        """Count, look after the admin socket and the workers, and show the service manager that this process lives."""
        if now < self.deadline:
            return
        self.deadline = now + CHECK_INTERVAL
        self._status.sample()
        self._status.follow_settings()
        systemd.notify("WATCHDOG=1", self._state.environ)
        self._state.workers.kill_stalled(now)


class Supervisor:
    """From the start to the end of the relay."""

    def __init__(
        self,
        reread: Callable[[], Settings],
        environ: MutableMapping[str, str],
        wakeup: Wakeup,
        writer: LogWriter,
        terminal: Terminal,
    ) -> None:
        """`reread` reads the configuration again; it raises RelayError."""
        self._wakeup = wakeup
        self._terminal = terminal
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ, wakeup.clear)
        self._pipes = LogPipes(writer)
        self._state = RelayState(environ)
        self._respawn = Respawn(self._state)
        health = Health()
        self._status = Status(self._state, self._respawn, self._selector, writer, health)
        self._takeover_server = TakeoverServer(self._selector, self._state)
        self._rollout = Rollout(self._state, self._respawn, self._status, writer, reread)
        self._shutdown = Shutdown(
            self._state, self._rollout, self._respawn, self._status, self._takeover_server, self._pipes
        )
        self._links = Links(self._selector, self._state)
        heartbeat = Heartbeat(self._state, self._status)
        self._doctor = Doctor(self._selector, self._state, health)
        self._managers: Sequence[Manager] = (
            *(terminal, self._shutdown, self._respawn, self._status, heartbeat, self._rollout),
            *(self._links, self._doctor),
        )

    # --- the start

    def start(self, settings: Settings, *, take_over: bool) -> bool:
        """Everything up to READY. False if told to stop before that. Raises RelayError. In both cases no process and no
        rule is left behind. With `take_over`, a relay that is there already hands over."""
        logging.getLogger().addHandler(self._status.problems)
        first, offer, forgotten = self._prepare(settings, take_over)
        if offer is None:
            first.tune()
            self._status.listen(settings.admin)
        self._state.workers = Workers(self._selector, Scoreboard.create(first.limits.room), self._pipes)
        try:
            if not self._put_in_force(first, offer):
                self._give_up_start()
                log.info("stopped before it was ready")
                return False
        except BaseException:
            self._give_up_start()
            raise
        self._status.open()
        if not self._state.ending:  # told to stop in the very moment: it drains already
            self._takeover_server.open()
            _log_listening(first)
            self._rollout.notify_ready(forgotten)
        return True

    def _prepare(self, settings: Settings, take_over: bool) -> tuple[Generation, Offer | None, Sequence[str]]:
        """The first generation, what another relay offers, and the names of listeners that the service manager has
        stored and that are not needed any more."""
        kept, unfit = listeners.adopt_all(settings, self._state.environ)
        self._state.inherited = any(not one.stored for one in kept)
        offer = None
        if take_over and not kept:
            offer = takeover_client.find(settings)
            kept = offer.listeners if offer else []
        first = prepare(settings, kept, number=1, inherited=self._state.inherited)
        unwanted = [one for one in kept if one not in first.listeners]
        forgotten = [*unfit, *(one.stored_name for one in unwanted)]
        listeners.close_all(unwanted)
        return first, offer, forgotten

    def _put_in_force(self, first: Generation, offer: Offer | None) -> bool:
        """False if told to stop before. Raises RelayError."""
        self._rollout.begin(first, offer)
        while self._state.current is None:
            self._turn()
            if self._state.current is None and self._state.ending:
                return False
        return True

    def _give_up_start(self) -> None:
        self._state.workers.dismiss(self._state.workers)
        self._status.close()
        self._links.close()

    # --- the loop

    def run(self) -> int:
        """Until told to stop. Returns the exit code."""
        while len(self._state.workers) or not self._state.ending:
            self._turn()
        self._links.close()
        self._doctor.close()
        self._shutdown.close()
        return 1 if self._shutdown.failed else 0

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._timeout()):
            key.data()
            self._handle_events()
        for number in self._wakeup.signals():
            self._handle_signal(number)
        now = time.monotonic()
        for manager in self._managers:
            manager.tick(now)
        if self._rollout.requested and self._state.busy is None and self._takeover_server.is_idle:
            self._rollout.reload()

    def _timeout(self) -> float:
        """Seconds to wait for something to happen."""
        deadlines = (manager.deadline for manager in self._managers)
        return max(0.0, min(at for at in deadlines if at is not None) - time.monotonic())

    def _handle_events(self) -> None:
        """After each call, so that the next one finds done what this one has brought."""
        for event in self._state.workers.take_events():
            self._handle_worker(event)
        commit = self._takeover_server.take_commit()
        if commit is not None:
            try:
                self._shutdown.hand_over(commit)
            finally:
                if commit.guard is not None:
                    os.close(commit.guard)

    def _handle_worker(self, event: WorkerEvent) -> None:
        if event.ended:
            self._handle_end(event.worker)
        else:
            self._rollout.on_worker_ready(event.worker)

    def _handle_end(self, worker: WorkerProcess) -> None:
        how = self._state.workers.reap(worker)
        if os.getpid() == 1:
            self._reap_orphans()  # those behind it
        if self._rollout.is_rising(worker):
            self._rollout.give_up(worker.why_it_failed(how))
        elif worker.wanted and not self._state.ending:
            if worker.stage is Stage.STARTING:
                log.error("%s", worker.why_it_failed(how))
            if not self._respawn.schedule():
                self._shutdown.fail()

    # --- signals

    def _handle_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._rollout.requested = self._rollout.requested or not self._terminal.takes_hup()
        elif number == signal.SIGUSR1:
            self._show_live()
        elif number == signal.SIGCHLD:
            self._reap_orphans()
        elif self._state.current is None:
            self._state.phase = Phase.DRAINING  # which `start` sees
        else:
            self._shutdown.stop(at_once=number == signal.SIGINT or self._state.phase is Phase.DRAINING)

    def _show_live(self) -> None:
        # Not those that still boot: they take their first order for the one to serve, or to end.
        for worker in self._status.askable:
            worker.show_live()
        log.info("connections", extra=self._state.workers.numbers._asdict())

    def _reap_orphans(self) -> None:
        """Not the workers: the end of its channel tells of one."""
        reaper.reap_orphans({worker.pid for worker in self._state.workers})


def _log_listening(generation: Generation) -> None:
    settings = generation.settings
    log.info(
        "listening",
        extra={
            "version": __version__,
            "listeners": ", ".join(one.name for one in generation.listeners),
            "mode": settings.mode,
            "preserve_source": settings.preserve_source,
            "max_connections": generation.limits.most,
            "mark": f"{generation.worker_tuning.mark:#x}",
            "workers": generation.pool.size,
        },
    )
