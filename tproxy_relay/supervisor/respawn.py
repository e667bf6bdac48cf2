"""Workers in the place of those that have died: the first at once, the next later and later, and in the end none."""

import logging
import time
from collections import deque

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs.repeats import Complaint
from tproxy_relay.supervisor.state import RelayState

MAX_DEATHS = 5
DEATHS_PERIOD = 60.0
"""So many workers that die within so many seconds stop the relay."""
FIRST_PAUSE = 0.1
"""Seconds before the second death in that time is made good; the next pauses are twice as long, each."""
RETRY_INTERVAL = 1.0
"""Seconds until a worker that could not be started is tried again."""

log = logging.getLogger(__name__)


class Deaths:
    """How quickly workers die, and how long to wait before the next one is started."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=MAX_DEATHS)

    def recent(self, now: float) -> int:
        """How many there were within the last DEATHS_PERIOD seconds, of the last MAX_DEATHS."""
        return sum(now - death <= DEATHS_PERIOD for death in self._times)

    def pause(self, now: float) -> float | None:
        """After one more death: seconds to wait, so that a worker that dies again and again does not take the
        processors; None: stop trying."""
        self._times.append(now)
        recent = self.recent(now)
        if recent >= MAX_DEATHS:
            return None
        return float(FIRST_PAUSE * 2 ** (recent - 2)) if recent > 1 else 0.0


class Respawn:
    """The workers that are to be started, and when."""

    def __init__(self, state: RelayState) -> None:
        self._state = state
        self._deaths = Deaths()
        self._due: list[float] = []
        self._lack = Complaint()

    @property
    def recent_deaths(self) -> int:
        """How many workers have died within the last DEATHS_PERIOD seconds."""
        return self._deaths.recent(time.monotonic())

    def schedule(self) -> bool:
        """A worker has died, and nobody had told it to end. False if the relay is to stop for that."""
        now = time.monotonic()
        pause = self._deaths.pause(now)
        if pause is None:
            log.critical(
                "workers die again and again, stopping", extra={"deaths": MAX_DEATHS, "seconds": DEATHS_PERIOD}
            )
            return False
        self._due.append(now + pause)
        return True

    @property
    def deadline(self) -> float | None:
        """When `tick` has a worker to start (time.monotonic()); None: there is none to start."""
        return min(self._due, default=None)

    def tick(self, now: float) -> None:
        """Start the workers whose time has come; `now` is time.monotonic()."""
        due = [at for at in self._due if at <= now]
        self._due = [at for at in self._due if at > now]
        for _ in due:
            self._start()

    def _start(self) -> None:
        try:
            self._state.workers.start(self._state.generation)
            if self._lack.ends():
                log.info("workers can be started again")
        except SystemRefusedError as error:
            if self._lack.begins(str(error)):
                log.error("%s", error)
            self._due.append(time.monotonic() + RETRY_INTERVAL)

    def cancel(self) -> None:
        """Start none of those that are due: the generation in force is complete, or the relay takes no more clients."""
        self._due.clear()
