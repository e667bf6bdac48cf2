"""The workers of the relay: started, replaced when they die, killed when they stall, and added up.

Main thread only. What the workers do, and when, is the supervisor's decision.
"""

import logging
import selectors
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.ipc.scoreboard import NO_NUMBERS, NO_TRAFFIC, Numbers, Scoreboard, Traffic
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.net.listeners import Listener
from tproxy_relay.outcome import Outcome
from tproxy_relay.supervisor.generation import Generation
from tproxy_relay.supervisor.worker_process import Stage, WorkerEvent, WorkerProcess

BOOT_TIMEOUT = 30.0
"""Seconds for a worker to get ready; it takes a tenth of one."""
CHECK_INTERVAL = 1.0
"""Seconds between two checks of the workers."""
LATE = 2.0
"""Seconds between two checks after which it was this process or the whole host that stood still, and nothing is said
against the workers."""
HANDSHAKE_GRACE = 1.0
"""Seconds for the handshakes that are under way when a listener takes no new connections any more: a round trip, and
one retransmission on a short path."""

log = logging.getLogger(__name__)


class Workers:
    """All workers that there are, of whatever generation."""

    def __init__(self, selector: selectors.BaseSelector, scoreboard: Scoreboard, pipes: LogPipes) -> None:
        """The data of what is registered is the method to call; then there may be events to take."""
        self._selector = selector
        self._scoreboard = scoreboard
        self._pipes = pipes
        self._workers: list[WorkerProcess] = []
        self._past, self._past_traffic = NO_NUMBERS, NO_TRAFFIC
        self.deaths = 0
        """Of workers, and nobody had told them to end."""
        self._events: deque[WorkerEvent] = deque()
        self._checked_at = time.monotonic()
        self._forgiving_until = 0.0

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(list(self._workers))

    def __len__(self) -> int:
        return len(self._workers)

    def of(self, generation: Generation) -> list[WorkerProcess]:
        """The workers that were started for that generation."""
        return [worker for worker in self._workers if worker.generation == generation.number]

    def take_events(self) -> Iterator[WorkerEvent]:
        """What has happened to workers since the last call, in that order."""
        while self._events:
            yield self._events.popleft()

    def start(self, generation: Generation) -> None:
        """Start one more of its workers. Raises SystemRefusedError."""
        slot = self._scoreboard.claim()
        if slot is None:
            raise SystemRefusedError("too many workers still finish their connections: wait for them, or restart")
        try:
            cpu = self._own_cpu(generation)
            worker = WorkerProcess(generation, self._scoreboard, slot, cpu, self._pipes, self._events)
        except BaseException:
            self._scoreboard.clear(slot)
            raise
        self._workers.append(worker)
        self._selector.register(worker, selectors.EVENT_READ, worker.on_readable)
        log.info("worker started", extra={"pid": worker.pid, "generation": generation.number})

    def _own_cpu(self, generation: Generation) -> int | None:
        """The processor that has the fewest of its workers."""
        taken = Counter(worker.cpu for worker in self.of(generation))
        return min(generation.pool.cpus, key=lambda cpu: taken[cpu], default=None)

    def reap(self, worker: WorkerProcess) -> str:
        """After the end of its channel. Returns how it has ended (`exit 0`, `signal 9`). Its last connections were
        reset by the kernel."""
        self._selector.unregister(worker)
        self._workers.remove(worker)
        how, (numbers, traffic) = worker.reap(), self._scoreboard.clear(worker.slot)
        self._past += with_lost(numbers)
        self._past_traffic += traffic
        expected = worker.stage is Stage.DISMISSED or worker.leaving and how == "exit 0"
        self.deaths += not expected
        level = logging.DEBUG if expected else logging.ERROR
        log.log(level, "worker ended", extra={"pid": worker.pid, "how": how, "live": numbers.live})
        return how

    @property
    def numbers(self) -> Numbers:
        """The connections of all workers that there are and were."""
        return sum((worker.numbers for worker in self._workers), self._past)

    @property
    def traffic(self) -> Traffic:
        """What the connections of all workers that there are and were have carried."""
        return sum((worker.traffic for worker in self._workers), self._past_traffic)

    def kill_stalled(self, now: float) -> None:
        """Kill the workers that stand still; `now` is time.monotonic(), CHECK_INTERVAL later each time. Their
        connections are reset, and their clients go to others."""
        late = self._checked_at + LATE
        self._checked_at = now
        if now > late:
            self._forgiving_until = now + BOOT_TIMEOUT
        if now < self._forgiving_until:
            return
        for worker in self._workers:
            most = worker.stall_timeout if worker.has_served else BOOT_TIMEOUT
            silence = worker.silence
            suspected, worker.suspected = worker.suspected, bool(most) and silence > most
            # At the first check it may only have been stopped together with this process, and be about to go on.
            if worker.suspected and suspected and not worker.stalled:
                log.error("worker stalled", extra={"pid": worker.pid, "seconds": round(silence, 1)})
                worker.stalled = True
                worker.kill()

    @staticmethod
    def dismiss(workers: Iterable[WorkerProcess]) -> None:
        """Kill workers that have no connections yet, and are not needed any more."""
        for worker in workers:
            worker.dismiss()


def last_clients(gone: Sequence[Listener]) -> tuple[list[str], float]:
    """For workers that leave: the names of the listeners that are gone, and for how many seconds to go on with them.
    Nobody else hears of clients whose connection to one of these is under way."""
    return [listener.name for listener in gone], HANDSHAKE_GRACE if gone else 0.0


def with_lost(numbers: Numbers) -> Numbers:
    """The last numbers of a worker: the connections that it still had have ended with it."""
    closed = Counter(numbers.closed)
    closed[Outcome.ABORTED.value] += numbers.live
    return Numbers(numbers.accepted, 0, dict(+closed))
