"""What the relay says of itself to those who ask, and where they can ask it. docs/looking-in.rst has the fields."""

import logging
import os
import selectors
import time
from collections.abc import Sequence

from tproxy_relay import __version__
from tproxy_relay.admin import address
from tproxy_relay.admin.address import AdminSocket
from tproxy_relay.admin.api import Api
from tproxy_relay.admin.history import History, Sample
from tproxy_relay.errors import RelayError
from tproxy_relay.ipc.histogram import Histogram
from tproxy_relay.ipc.scoreboard import Numbers, Traffic
from tproxy_relay.logs.recent import Problems
from tproxy_relay.logs.repeats import Complaint
from tproxy_relay.logs.writer import LogWriter
from tproxy_relay.net import listeners, proc_net
from tproxy_relay.outcome import Outcome
from tproxy_relay.supervisor import health
from tproxy_relay.supervisor.health import Health
from tproxy_relay.supervisor.respawn import Respawn
from tproxy_relay.supervisor.state import RelayState
from tproxy_relay.supervisor.worker_process import Stage, WorkerProcess

log = logging.getLogger(__name__)


class Status:
    """The document of /status, the samples behind it, and the sockets where it is answered."""

    def __init__(
        self,
        state: RelayState,
        respawn: Respawn,
        selector: selectors.BaseSelector,
        writer: LogWriter,
        health: Health,
    ) -> None:
        """`health` is filled by others, and by this one with what the relay itself knows."""
        self.problems = Problems()
        """A handler for the log of this process."""
        self._state = state
        self._respawn = respawn
        self._selector = selector
        self._writer = writer
        self._health = health
        self._started = time.time()
        self._history = History()
        self._overflows_before = proc_net.listen_overflows()
        self._admin: AdminSocket | None = None
        self._admin_trouble = Complaint()
        self._api: Api | None = None

    # --- where it can be asked

    def listen(self, where: address.Where | None) -> None:
        """Listen where `admin` says, without an answer until `open`; None: nowhere. Raises SystemRefusedError."""
        self._admin = None if where is None else address.listen(where)

    def open(self) -> None:
        """Answer from now on, at the relay's own socket and where it listens."""
        self._api = Api(self._selector, self, self._history)
        if self._admin is not None:
            self._api.open_public(self._admin)
        self.sample()
        self.follow_settings()

    def follow_settings(self) -> None:
        """Answer where `admin` says now. If that cannot be, it is to be called again every second: the relay before
        this one may be there for a moment yet."""
        if self._api is None or self._state.ending:
            return
        wanted = self._state.generation.settings.admin
        if wanted == self._api.public:
            return
        self._api.close_public()
        try:
            if wanted is not None:
                self._api.open_public(address.listen(wanted))
            self._admin_trouble.ends()
        except RelayError as error:
            if self._admin_trouble.begins(str(error)):
                log.error("%s", error)

    def close_public(self) -> None:
        """Answer at the relay's own socket only."""
        if self._api is not None:
            self._api.close_public()

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to do (time.monotonic()); None: not before somebody asks."""
        return None if self._api is None else self._api.deadline

    def tick(self, now: float) -> None:
        """End what has taken too long; `now` is time.monotonic()."""
        if self._api is not None:
            self._api.tick(now)

    def close(self) -> None:
        """Answer nobody any more, and close all sockets."""
        if self._api is not None:
            self._api.close()
        elif self._admin is not None:
            self._admin.close()

    # --- what is answered

    def sample(self) -> None:
        """Keep the numbers of this moment, for the history and the rates: to be called every second."""
        numbers, traffic = self._state.workers.numbers, self._state.workers.traffic
        self._history.add(
            Sample(time.time(), numbers.accepted, numbers.live, failed(numbers), traffic.bytes_up, traffic.bytes_down)
        )

    @property
    def log_dropped(self) -> int:
        """How many log records were lost, in all workers that there are and were, and here."""
        return self._state.workers.traffic.log_dropped + self._writer.dropped

    @property
    def askable(self) -> Sequence[WorkerProcess]:
        """The workers that may have connections."""
        return [worker for worker in self._state.workers if worker.has_served]

    @property
    def why_not_ready(self) -> str | None:
        """Why it takes no new connections, or why none of them come; None if all is well."""
        if self._state.ending:
            return f"the relay is {self._state.phase.value}"
        if not any(worker.stage is Stage.SERVING for worker in self.askable):
            return "no worker is at work"
        self._note_own_problems()
        serious = self._health.serious
        return f"degraded: {'; '.join(map(str, serious))}" if serious else None

    def _note_own_problems(self) -> None:
        self._health.put(health.OWN, health.of_relay(self._state, self._respawn), logs=False)

    @property
    def status(self) -> dict[str, object]:
        """The document of /status, as JSON takes it, but for what is asked of the workers."""
        state, now = self._state, time.time()
        numbers, traffic = state.workers.numbers, state.workers.traffic
        ruleset = None if state.interception is None else state.interception.health
        self._note_own_problems()
        problems = self._health.problems
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started": round(self._started, 3),
            "uptime_seconds": round(now - self._started, 3),
            "state": state.phase.value,
            "health": "degraded" if problems else "ok",
            "complaints": [str(one.problem) for one in problems],
            "problems": [one.as_json() for one in problems],
            "self_probe": self._health.self_probe,
            "connections": self._connections(numbers, now),
            "bytes": {"up": traffic.bytes_up, "down": traffic.bytes_down},
            "rates": self._history.rates(),
            "connect_seconds": _lengths(traffic.connect),
            "duration_seconds": _lengths(traffic.duration),
            "listeners": [
                {"name": one.name, "waiting": waiting, "backlog": backlog}
                for one in state.generation.listeners
                for waiting, backlog in [listeners.backlog(one)]
            ],
            "listen_overflows": proc_net.listen_overflows() - self._overflows_before,
            "workers": [self._worker(worker, worker.numbers, worker.traffic) for worker in state.workers],
            "worker_deaths": state.workers.deaths,
            "reloads": state.reloads,
            "reloads_refused": state.reloads_refused,
            "log_dropped": self.log_dropped,
            "ruleset": None if ruleset is None else ruleset._asdict(),
            "last_problems": self.problems.last,
        }

    def _connections(self, numbers: Numbers, now: float) -> dict[str, object]:
        last = self._history.last_accepted
        return {
            "accepted": numbers.accepted,
            "active": numbers.live,
            "closed": numbers.closed,
            "most": self._state.generation.limits.most,
            "seconds_since_last": None if last is None else round(max(0.0, now - last), 1),
        }

    def _worker(self, worker: WorkerProcess, numbers: Numbers, traffic: Traffic) -> dict[str, object]:
        return {
            "pid": worker.pid,
            "generation": worker.generation,
            "state": "leaving" if worker.leaving else "serving" if worker.has_served else "starting",
            "accepted": numbers.accepted,
            "active": numbers.live,
            "closed": numbers.closed,
            "bytes": {"up": traffic.bytes_up, "down": traffic.bytes_down},
            "room": self._state.generation.limits.room,
        }


def _lengths(histogram: Histogram) -> dict[str, object]:
    """The buckets, and what one wants to know of them. None where a percentile lies above the last bound."""
    quantiles = {f"p{part}": histogram.quantile(part / 100) for part in (50, 90, 99)}
    return {
        "count": histogram.total,
        "sum": round(histogram.seconds, 6),
        **{name: value if value != float("inf") else None for name, value in quantiles.items()},
        "buckets": [[bound, count] for bound, count in zip((*histogram.bounds, None), histogram.counts)],
    }


def failed(numbers: Numbers) -> int:
    """Connections that did not end as TCP connections do: those with a warning in the log."""
    return sum(count for outcome, count in numbers.closed.items() if not Outcome(outcome).ordinary)
