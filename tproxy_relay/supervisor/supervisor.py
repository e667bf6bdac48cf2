"""The supervisor: it keeps the listeners, the ruleset and the workers, and touches no connection itself.

Its workers come in generations. The first one is started at the start, a new one at every reload; when all of a
new generation are ready, it takes the new clients, and the one before finishes its connections and ends. Everything
happens in one thread, whatever comes: a signal, a word or the end of a worker, another relay, or the time.
"""

import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import fields

from tproxy_relay import __version__
from tproxy_relay.admin import address
from tproxy_relay.admin.address import AdminSocket
from tproxy_relay.admin.api import Api
from tproxy_relay.admin.history import History, Sample
from tproxy_relay.errors import ConfigError, RelayError, SystemRefusedError
from tproxy_relay.guard.guard_client import Interception
from tproxy_relay.intercept import ruleset
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel
from tproxy_relay.ipc.scoreboard import Scoreboard
from tproxy_relay.logs.recent import Problems
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.logs.writer import LogWriter, Sink
from tproxy_relay.net import listeners
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import status as status_document
from tproxy_relay.supervisor import takeover
from tproxy_relay.supervisor.generation import Prepared, fixed, prepare
from tproxy_relay.supervisor.status import Facts
from tproxy_relay.supervisor.takeover import Door, Offer
from tproxy_relay.supervisor.worker_process import WorkerProcess
from tproxy_relay.supervisor.workers import DEATHS_PERIOD, LOOK_INTERVAL, MAX_DEATHS, Deaths, Generation, Workers
from tproxy_relay.system import systemd
from tproxy_relay.system.wakeup import Wakeup
from tproxy_relay.worker.worker import ABORT_GRACE

LEAVE_TIMEOUT = 2.0
"""Seconds for workers that are told to take no more clients to have heard of it; it takes some milliseconds."""
HANDSHAKE_GRACE = 1.0
"""Seconds for the handshakes that are under way when a listener takes no new connections any more: a round trip, and
one retransmission on a short path."""
END_TIMEOUT = ABORT_GRACE + 1.5
"""Seconds for workers to end that have nothing to wait for; then they are killed."""

LOG_TIMEOUT = 1.0
"""Seconds for the last log lines of workers that have ended."""

log = logging.getLogger(__name__)


class Supervisor:
    """From the start to the end of the relay."""

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        environ: MutableMapping[str, str],
        wakeup: Wakeup,
        writer: LogWriter,
    ) -> None:
        """`reread` reads the configuration again; it raises RelayError."""
        self._settings = settings
        self._reread = reread
        self._environ = environ
        self._wakeup = wakeup
        self._writer = writer
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._pipes = LogPipes(writer)
        self._workers: Workers
        self._generations = 0
        self._now: Generation | None = None
        self._rising: Generation | None = None
        self._retiring: Generation | None = None
        self._retired_by = 0.0
        self._sink: Sink | None = None
        self._inherited = False
        self._interception: Interception | None = None
        self._offer: Offer | None = None
        self._door: Door | None = None
        self._api: Api | None = None
        self._admin: AdminSocket | None = None
        self._admin_trouble = ""
        self._started = time.time()
        self._history, self._problems = History(), Problems()
        self._overflows_before = listeners.overflows()
        self._reloads = self._reloads_refused = 0
        self._deaths = Deaths()
        self._replace_at: list[float] = []
        self._look_at = time.monotonic() + LOOK_INTERVAL
        self._reload_wanted = self._stop_wanted = False
        self._stopping = self._handed_over = self._failed = False
        self._deadline: float | None = None

    # --- the start

    def start(self) -> bool:
        """Everything up to READY. False if told to stop before that. Raises RelayError. In both cases no process and no
        rule is left behind."""
        logging.getLogger().addHandler(self._problems)
        kept, unfit = listeners.adopt_all(self._settings, self._environ)
        self._inherited = any(not one.stored for one in kept)
        if self._settings.take_over and not kept:
            self._offer = takeover.find(self._settings)
            kept = self._offer.listeners if self._offer else []
        prepared = prepare(self._settings, kept, inherited=self._inherited)
        unwanted = [one for one in kept if one not in prepared.listeners]
        forgotten = [*unfit, *(one.stored_name for one in unwanted)]
        listeners.close_all(unwanted)
        if self._offer is None:
            self._tune(prepared)
        if self._settings.admin is not None and self._offer is None:
            self._admin = address.listen(self._settings.admin)
        self._workers = Workers(self._selector, Scoreboard.create(prepared.spec.limits.room), self._pipes)
        try:
            self._raise(prepared)
            while self._now is None:
                self._turn()
                if self._stop_wanted:
                    self._workers.dismiss(self._workers)
                    self._close_admin()
                    log.info("stopped before it was ready")
                    return False
        except BaseException:
            self._workers.dismiss(self._workers)
            self._close_admin()
            raise
        self._door = Door(self._selector, self)
        self._api = Api(self._selector, self, self._history)
        if self._admin is not None:
            self._api.open_public(self._admin)
        self._sample()
        self._answer_elsewhere()
        self._say_listening(self._now.prepared)
        self._say_ready(forgotten)
        return True

    def _close_admin(self) -> None:
        if self._admin is not None:
            self._admin.close()

    def _raise(self, prepared: Prepared) -> None:
        """Start a generation of workers; they wait until all of them are ready."""
        self._generations += 1
        self._rising = Generation(self._generations, prepared)
        for _ in range(prepared.workers):
            self._workers.start(self._rising)

    @staticmethod
    def _tune(prepared: Prepared) -> None:
        for listener in prepared.listeners:
            listeners.tune(listener, prepared.tuning)

    @staticmethod
    def _say_listening(prepared: Prepared) -> None:
        settings, spec = prepared.settings, prepared.spec
        log.info(
            "listening",
            extra={
                "version": __version__,
                "listeners": ", ".join(one.name for one in prepared.listeners),
                "mode": settings.mode,
                "preserve_source": settings.preserve_source,
                "max_connections": spec.limits.most,
                "mark": f"{spec.tuning.mark:#x}",
                "workers": prepared.workers,
            },
        )

    def _say_ready(self, forgotten: Sequence[str]) -> None:
        """To the service manager, which keeps the listeners open while this relay is started again (FDSTORE of
        sd_notify(3)); those of a socket unit it keeps anyway."""
        assert self._now is not None
        # First, as a manager that is slow has room for a few messages only (net.unix.max_dgram_qlen).
        systemd.notify(f"READY=1\nSTATUS=relaying with {self._now.prepared.workers} workers", self._environ)
        if not self._inherited:
            for name in forgotten:
                systemd.notify(f"FDSTOREREMOVE=1\nFDNAME={name}", self._environ)
            for listener in self._now.prepared.listeners:
                stored = f"FDSTORE=1\nFDNAME={listener.stored_name}"
                systemd.notify(stored, self._environ, [listener.sock.fileno()])

    # --- the loop

    def run(self) -> int:
        """Until told to stop. Returns the exit code."""
        while len(self._workers) or not self._stopping:
            self._turn()
            if self._stop_wanted and not self._stopping:
                self._stop(at_once=False)
        self._end()
        return 1 if self._failed else 0

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._patience()):
            if isinstance(key.data, WorkerProcess):
                self._hear(key.data)
            elif isinstance(key.data, Door):
                key.data.fired(key.fileobj)
            elif callable(key.data):
                key.data()
        for number in self._wakeup.signals():
            self._obey(number)
        self._keep_time()
        if self._retiring is not None:
            self._await_retirement(self._retiring)
        if self._reload_wanted and self.busy is None and not (self._door is None or self._door.in_use):
            self._reload()

    @property
    def busy(self) -> str | None:
        """Why neither a reload nor another relay can begin now."""
        if self._stopping:
            return "it is stopping"
        return None if self._rising is None and self._retiring is None else "it is reloading"

    def _patience(self) -> float:
        due = [self._look_at, *self._replace_at]
        if self._deadline is not None:
            due.append(self._deadline)
        if self._retiring is not None:
            due.append(self._retired_by)
        if self._api is not None and self._api.deadline is not None:
            due.append(self._api.deadline)
        return max(0.0, min(due) - time.monotonic())

    def _obey(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._reload_wanted = True
        elif number == signal.SIGUSR1:
            self._show_live()
        elif number == signal.SIGCHLD:
            self._reap_orphans()
        elif self._now is None:
            self._stop_wanted = True
        else:
            self._stop(at_once=number == signal.SIGINT or self._stopping and not self._handed_over)

    def _show_live(self) -> None:
        for worker in self._workers:
            worker.show_live()
        log.info("connections", extra=self._workers.numbers._asdict())

    def _reap_orphans(self) -> None:
        """As PID 1 of a container: what other programs have left behind is ours."""
        own = {worker.pid for worker in self._workers}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if ended is None or ended.si_pid in own:
                    return  # a worker: the end of its channel tells of it
                os.waitpid(ended.si_pid, os.WNOHANG)
            except ChildProcessError:
                return

    # --- workers that come

    def _hear(self, worker: WorkerProcess) -> None:
        if not worker.hear():
            self._has_ended(worker)
        elif worker.ready and not worker.serving and not worker.leaving:
            self._is_ready(worker)

    def _is_ready(self, worker: WorkerProcess) -> None:
        if self._rising is None or worker.generation != self._rising.number:
            worker.serve()  # in the place of one that has died
            return
        fresh = self._workers.of(self._rising)
        if all(one.ready for one in fresh):
            try:
                self._promote(self._rising, fresh)
            except RelayError as error:
                self._give_up(error)

    def _promote(self, generation: Generation, fresh: Sequence[WorkerProcess]) -> None:
        """The new generation takes over: the ruleset leads to it, and it accepts what has come meanwhile."""
        before, offer = self._now, self._offer
        if offer is None:
            self._change_ruleset(generation.prepared)
        else:
            self._take_over(offer, generation.prepared)
            self._tune(generation.prepared)  # not before: they are the other one's as well
            self._offer = None
        for worker in fresh:
            worker.serve()
        self._now, self._rising = generation, None
        self._replace_at = []  # it is complete
        if before is not None:
            self._retire(before, generation)

    def _give_up(self, error: RelayError) -> None:
        """The new generation cannot take over: at the start that is the end."""
        rising, self._rising = self._rising, None
        if self._now is None or rising is None:
            raise error
        self._workers.dismiss(self._workers.of(rising))
        if self._sink is not None:
            self._sink.close()
        kept = self._now.prepared.listeners
        listeners.close_all([one for one in rising.prepared.listeners if one not in kept])
        self._refuse_reload(error)

    # --- workers that go

    def _has_ended(self, worker: WorkerProcess) -> None:
        how = self._workers.reap(worker)
        if os.getpid() == 1:
            self._reap_orphans()  # those behind it
        if self._rising is not None and worker.generation == self._rising.number:
            self._give_up(worker.why_it_failed(how))
        elif not worker.leaving and not worker.unwanted and not self._stopping:
            if not worker.ready:
                log.error("%s", worker.why_it_failed(how))
            self._replace()

    def _replace(self) -> None:
        now = time.monotonic()
        pause = self._deaths.pause(now)
        if pause is not None:
            self._replace_at.append(now + pause)
            return
        log.critical("workers die again and again, stopping", extra={"deaths": MAX_DEATHS, "seconds": DEATHS_PERIOD})
        self._failed = True
        self._stop(at_once=False)

    def _start_replacement(self) -> None:
        assert self._now is not None
        try:
            self._workers.start(self._now)
        except SystemRefusedError as error:
            log.error("%s", error)
            self._replace_at.append(time.monotonic() + LOOK_INTERVAL)

    def _keep_time(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self._deadline = None
            for worker in self._workers:
                worker.kill()
        due = [at for at in self._replace_at if at <= now]
        self._replace_at = [at for at in self._replace_at if at > now]
        for _ in due:
            self._start_replacement()
        if self._api is not None:
            self._api.tick(now)
        if now >= self._look_at:
            self._look_at = now + LOOK_INTERVAL
            self._sample()
            self._answer_elsewhere()
            systemd.notify("WATCHDOG=1", self._environ)
            self._workers.kill_stalled()

    # --- looking in

    def _sample(self) -> None:
        numbers, traffic = self._workers.numbers, self._workers.traffic
        failed = status_document.failed(numbers)
        self._history.add(
            Sample(time.time(), numbers.accepted, numbers.live, failed, traffic.bytes_up, traffic.bytes_down)
        )

    @property
    def askable(self) -> Sequence[WorkerProcess]:
        """The workers that may have connections."""
        return [worker for worker in self._workers if worker.serving]

    @property
    def why_not_ready(self) -> str | None:
        """Why it takes no new connections; None if it does."""
        if self._stopping:
            return f"the relay is {self._state}"
        return None if any(not worker.leaving for worker in self.askable) else "no worker is at work"

    @property
    def _state(self) -> str:
        if self._stopping:
            return "handed over" if self._handed_over else "draining"
        return "running" if self.busy is None else "reloading"

    @property
    def status(self) -> dict[str, object]:
        """The document of /status, but for what is asked of the workers."""
        assert self._now is not None
        traffic = self._workers.traffic
        facts = Facts(
            started=self._started,
            state=self._state,
            prepared=self._now.prepared,
            workers=list(self._workers),
            numbers=self._workers.numbers,
            traffic=traffic,
            log_dropped=traffic.log_dropped + self._writer.dropped,
            deaths=self._workers.deaths,
            recent_deaths=self._deaths.recent(time.monotonic()),
            reloads=self._reloads,
            reloads_refused=self._reloads_refused,
            overflows=listeners.overflows() - self._overflows_before,
            health=None if self._interception is None else self._interception.health,
            history=self._history,
            problems=self._problems,
        )
        return status_document.document(facts)

    def _answer_elsewhere(self) -> None:
        """Where `admin` says now. If that cannot be, it is tried again every LOOK_INTERVAL seconds: the relay before
        this one may be there for a moment yet."""
        wanted = self._settings.admin
        if self._api is None or self._stopping or wanted == self._api.public:
            return
        self._api.close_public()
        try:
            if wanted is not None:
                self._api.open_public(address.listen(wanted))
            self._admin_trouble = ""
        except RelayError as error:
            if str(error) != self._admin_trouble:
                log.error("%s", error)
            self._admin_trouble = str(error)

    # --- reload

    def _reload(self) -> None:
        """Read the configuration again, and start a generation that obeys it."""
        self._reload_wanted = False
        assert self._now is not None
        systemd.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", self._environ)
        before = self._now.prepared
        try:
            settings = self._reread()
            refuse_unchangeable(before.settings, settings)
            self._sink = self._writer.open(settings)
            try:
                prepared = prepare(settings, before.listeners, inherited=self._inherited)
            except BaseException:
                self._sink.close()
                raise
        except RelayError as error:
            self._refuse_reload(error)
            return
        try:
            self._raise(prepared)
        except RelayError as error:
            self._give_up(error)

    def _refuse_reload(self, error: RelayError) -> None:
        self._reloads_refused += 1
        log.error("reload refused", extra={"why": str(error)})
        self._say_ready([])

    def _retire(self, before: Generation, after: Generation) -> None:
        """Have the workers of that generation finish what they have. Clients that come in the same moment may still be
        theirs, so the reload is done when all of them have heard of it."""
        old, new = before.prepared, after.prepared
        self._settings = new.settings
        gone = [one for one in old.listeners if one not in new.listeners]
        for worker in self._workers.of(before):
            worker.leave(*self._last_clients(gone), None)
        listeners.close_all(list(gone))
        self._tune(new)
        self._retiring, self._retired_by = before, time.monotonic() + LEAVE_TIMEOUT

    def _await_retirement(self, before: Generation) -> None:
        leaving = (worker for worker in self._workers.of(before) if not worker.left)
        if any(leaving) and time.monotonic() < self._retired_by:
            return
        self._retiring = None
        assert self._now is not None
        self._has_reloaded(before.prepared, self._now)

    def _has_reloaded(self, old: Prepared, after: Generation) -> None:
        new, names = after.prepared, changed(old.settings, after.prepared.settings)
        assert self._sink is not None
        try:
            self._writer.change(self._sink)
        except RelayError as error:
            log.error("%s; the log goes on as before", error)
        if self._inherited and {"bind", "ports"} & set(names):
            log.warning("bind and ports change nothing: the listeners were passed on to this relay")
        self._answer_elsewhere()
        self._reloads += 1
        self._say_ready([one.stored_name for one in old.listeners if one not in new.listeners])
        log.info(
            "reloaded",
            extra={"generation": after.number, "workers": new.workers, "changed": ", ".join(names)},
        )

    @staticmethod
    def _last_clients(gone: Sequence[Listener]) -> tuple[list[str], float]:
        """For workers that leave: nobody else hears of those whose connection to one of these listeners is under
        way."""
        return [listener.name for listener in gone], HANDSHAKE_GRACE if gone else 0.0

    # --- the ruleset

    def _change_ruleset(self, prepared: Prepared) -> None:
        """Have it as these settings want it. Raises RelayError, with the one before in force."""
        if prepared.plan is None:
            if self._interception is not None:
                raise ConfigError("live connections need the ruleset, so a reload cannot end interception; restart")
        elif self._interception is None:
            interception = Interception(prepared.plan, prepared.settings.backend)
            interception.install()
            self._interception = interception
        else:
            self._interception.replace(prepared.plan)

    # --- from one relay to the next

    def _take_over(self, offer: Offer, prepared: Prepared) -> None:
        """Everything is ready: from now on the clients are ours. Raises RelayError as long as they are not."""
        if offer.plan is None:
            self._change_ruleset(prepared)
            try:
                offer.commit(prepared.listeners, None)
            except BaseException:
                if self._interception is not None:
                    self._interception.remove()
                raise
            return
        if prepared.plan is None:
            raise ConfigError(f"process {offer.pid} intercepts, and this relay would not: stop that one first")
        ruleset.refuse_losses(offer.plan, prepared.plan)
        ours, guards = channel.pair()
        try:
            offer.commit(prepared.listeners, guards.fileno())
        finally:
            guards.close()
        self._interception = Interception.take_over(ours, prepared.plan, prepared.settings.backend)
        try:
            self._interception.replace(prepared.plan)
        except RelayError as error:
            log.error("the ruleset stays as it was: %s", error)  # it leads here, and the other relay is ending

    @property
    def listening(self) -> list[Endpoint]:
        """By the settings."""
        assert self._now is not None
        return [listener.wanted for listener in self._now.prepared.listeners]

    def offer_to(self, successor: Channel) -> None:
        """Show another relay what it would take over."""
        assert self._now is not None
        now = self._now.prepared
        takeover.offer(successor, now.settings, now.listeners, now.plan)

    def hand_over(self, pid: int, kept: Sequence[str], guard: int | None) -> None:
        """Its workers are ready. Ours finish their connections; nothing is to be undone at the end."""
        assert self._now is not None
        if self._interception is not None and guard is not None:
            self._interception.hand_over(guard, pid)
        ours = self._now.prepared.listeners
        for worker in self._workers:
            worker.leave(*self._last_clients([one for one in ours if one.name not in kept]), None)
        listeners.close_all(list(ours))
        if self._api is not None:
            self._api.close_public()  # that is the other one's now
        self._stopping = self._handed_over = True
        self._replace_at = []
        log.info("handed over", extra={"pid": pid, "live": self._workers.numbers.live})

    # --- the end

    def _stop(self, *, at_once: bool) -> None:
        """Take no new connections; finish the live ones, or reset them."""
        grace = 0.0 if self._stopping else self._begin_to_stop()
        if self._handed_over and self._interception is not None:
            self._interception.drain()  # so that its guard need not tell us to
        self._handed_over = False
        if at_once:
            for worker in self._workers:
                worker.stop()
            self._deadline = time.monotonic() + END_TIMEOUT
            return
        timeout = self._settings.drain_timeout
        for worker in self._workers:
            worker.leave(None, grace, timeout)
        log.info("draining", extra={"live": self._workers.numbers.live, "drain_timeout": timeout})
        self._deadline = time.monotonic() + grace + timeout + END_TIMEOUT

    def _begin_to_stop(self) -> float:
        """Returns the seconds for which clients may still come that were intercepted before."""
        self._stopping = True
        self._replace_at = []
        self._retiring = None
        systemd.notify("STOPPING=1", self._environ)
        grace = 0.0
        if self._interception is not None and not self._refuses_when_failed:
            self._interception.drain()
            grace = HANDSHAKE_GRACE
        if self._door is not None:
            self._door.close()
        for generation in (self._rising, self._now):
            if generation is not None:
                listeners.close_all(list(generation.prepared.listeners))
        if self._rising is not None:
            self._workers.dismiss(self._workers.of(self._rising))
            self._rising = None
        return grace

    @property
    def _refuses_when_failed(self) -> bool:
        """on-failure closed: the ruleset stands, and refuses what has no listener any more."""
        return self._failed and self._settings.on_failure == "closed"

    def _end(self) -> None:
        if self._api is not None:
            self._api.close()
        self._pipes.drain(LOG_TIMEOUT)
        if self._interception is not None and not self._refuses_when_failed:
            self._interception.remove()  # nothing happens if another relay has it now
        dropped = self._workers.traffic.log_dropped + self._writer.dropped
        log.info("stopped", extra={**self._workers.numbers._asdict(), "log_dropped": dropped})


def changed(before: Settings, after: Settings) -> list[str]:
    """The options that are not as they were."""
    names = (field.name for field in fields(Settings))
    return [name.replace("_", "-") for name in names if getattr(before, name) != getattr(after, name)]


def refuse_unchangeable(before: Settings, after: Settings) -> None:
    """ConfigError if a reload would have to change what live connections depend on."""
    now, then = fixed(before), fixed(after)
    names = [name for name in now if now[name] != then[name]]
    if names:
        raise ConfigError(f"{', '.join(names)}: live connections depend on it, so a reload cannot change it; restart")
