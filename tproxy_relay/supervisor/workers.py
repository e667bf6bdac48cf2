"""The workers of the relay: started, replaced when they die, killed when they stall, and added up.

Main thread only. What the workers do, and when, is the supervisor's decision.
"""

import logging
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.ipc.scoreboard import NO_NUMBERS, NO_TRAFFIC, Numbers, Scoreboard, Traffic
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.outcome import Outcome
from tproxy_relay.supervisor.generation import Prepared
from tproxy_relay.supervisor.worker_process import WorkerProcess

BOOT_TIMEOUT = 30.0
"""Seconds for a worker to get ready; it takes a tenth of one."""
LOOK_INTERVAL = 1.0
"""Seconds between two looks at the workers."""
LATE = 2.0
"""Seconds between two looks after which it was this process or the whole host that stood still, and nothing is said
against the workers."""
MAX_DEATHS = 5
DEATHS_PERIOD = 60.0
"""So many workers that die within so many seconds stop the relay."""
FIRST_PAUSE = 0.1
"""Seconds before the second death in that time is made good; the next pauses are twice as long, each."""

log = logging.getLogger(__name__)


class Generation(NamedTuple):
    """Workers that were started with the same settings."""

    number: int
    prepared: Prepared


class Workers:
    """All workers that there are, of whatever generation."""

    def __init__(self, selector: selectors.BaseSelector, scoreboard: Scoreboard, pipes: LogPipes) -> None:
        """The selector will tell of workers, with the worker as its data."""
        self._selector = selector
        self._scoreboard = scoreboard
        self._pipes = pipes
        self._workers: list[WorkerProcess] = []
        self._past, self._past_traffic = NO_NUMBERS, NO_TRAFFIC
        self.deaths = 0
        """Of workers, and nobody had told them to end."""
        self._looked_at = time.monotonic()
        self._forgiving_until = 0.0

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(list(self._workers))

    def __len__(self) -> int:
        return len(self._workers)

    def of(self, generation: Generation) -> list[WorkerProcess]:
        """The workers of one generation."""
        return [worker for worker in self._workers if worker.generation == generation.number]

    def start(self, generation: Generation) -> None:
        """Start one more of its workers. Raises SystemRefusedError."""
        slot = self._scoreboard.claim()
        if slot is None:
            raise SystemRefusedError("too many workers still finish their connections: wait for them, or restart")
        try:
            cpu = self._own_cpu(generation)
            worker = WorkerProcess(generation.prepared, generation.number, self._scoreboard, slot, cpu, self._pipes)
        except BaseException:
            self._scoreboard.clear(slot)
            raise
        self._workers.append(worker)
        self._selector.register(worker, selectors.EVENT_READ, worker)
        log.info("worker started", extra={"pid": worker.pid, "generation": generation.number})

    def _own_cpu(self, generation: Generation) -> int | None:
        """The processor that has the fewest of its workers."""
        taken = Counter(worker.cpu for worker in self.of(generation))
        return min(generation.prepared.cpus, key=lambda cpu: taken[cpu], default=None)

    def reap(self, worker: WorkerProcess) -> str:
        """After the end of its channel. Returns how it has ended; its last connections were reset by the kernel."""
        self._selector.unregister(worker)
        self._workers.remove(worker)
        how, (numbers, traffic) = worker.reap(), self._scoreboard.clear(worker.slot)
        self._past += with_lost(numbers)
        self._past_traffic += traffic
        expected = worker.unwanted or worker.leaving and how == "exit 0"
        self.deaths += not expected
        level = logging.DEBUG if expected else logging.ERROR
        log.log(level, "worker ended", extra={"pid": worker.pid, "how": how, "live": numbers.live})
        return how

    @property
    def numbers(self) -> Numbers:
        """Of all workers that there are and were."""
        return sum((worker.numbers for worker in self._workers), self._past)

    @property
    def traffic(self) -> Traffic:
        """Of all workers that there are and were."""
        return sum((worker.traffic for worker in self._workers), self._past_traffic)

    def kill_stalled(self) -> None:
        """Call it every LOOK_INTERVAL seconds. Their connections are reset, and their clients go to others."""
        now = time.monotonic()
        late = self._looked_at + LATE
        self._looked_at = now
        if now > late:
            self._forgiving_until = now + BOOT_TIMEOUT
        if now < self._forgiving_until:
            return
        for worker in self._workers:
            most = worker.stall_timeout if worker.serving else BOOT_TIMEOUT
            silence = worker.silence
            suspected, worker.suspected = worker.suspected, bool(most) and silence > most
            # At the first look it may only have been stopped together with this process, and be about to go on.
            if worker.suspected and suspected and not worker.stalled:
                log.error("worker stalled", extra={"pid": worker.pid, "seconds": round(silence, 1)})
                worker.stalled = True
                worker.kill()

    @staticmethod
    def dismiss(workers: Iterable[WorkerProcess]) -> None:
        """Kill workers that have no connections yet, and are not needed any more."""
        for worker in workers:
            worker.unwanted = True
            worker.kill()


class Deaths:
    """How quickly workers die, and how long to wait before the next one is started."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MAX_DEATHS)

    def recent(self, now: float) -> int:
        """Within DEATHS_PERIOD seconds."""
        return sum(now - death <= DEATHS_PERIOD for death in self._times)

    def pause(self, now: float) -> float | None:
        """After one more death: seconds to wait, so that a worker that dies again and again does not take the
        processors; None: stop trying."""
        self._times.append(now)
        recent = self.recent(now)
        if recent >= MAX_DEATHS:
            return None
        return float(FIRST_PAUSE * 2 ** (recent - 2)) if recent > 1 else 0.0


def with_lost(numbers: Numbers) -> Numbers:
    """The last numbers of a worker: the connections that it still had have ended with it."""
    closed = Counter(numbers.closed)
    closed[Outcome.ABORTED.value] += numbers.live
    return Numbers(numbers.accepted, 0, dict(+closed))
