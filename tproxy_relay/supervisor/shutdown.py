"""The end of a relay: no new connections, the live ones are finished, reset or left alone, and nothing stays behind."""

import logging
import time

from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.net import listeners
from tproxy_relay.supervisor.respawn import Respawn
from tproxy_relay.supervisor.rollout import Rollout
from tproxy_relay.supervisor.state import Phase, RelayState
from tproxy_relay.supervisor.status import Status
from tproxy_relay.supervisor.takeover_server import Commit, TakeoverServer
from tproxy_relay.supervisor.workers import HANDSHAKE_GRACE, last_clients
from tproxy_relay.system import systemd
from tproxy_relay.worker.worker import ABORT_GRACE

END_TIMEOUT = ABORT_GRACE + 1.5
"""Seconds for workers to end that have nothing to wait for; then they are killed."""
LOG_TIMEOUT = 1.0
"""Seconds for the last log lines of workers that have ended."""

log = logging.getLogger(__name__)


class Shutdown:
    """Told to stop, twice perhaps; or to hand over to another relay, and then to stop."""

    def __init__(
        self,
        state: RelayState,
        rollout: Rollout,
        respawn: Respawn,
        status: Status,
        takeover_server: TakeoverServer,
        pipes: LogPipes,
    ) -> None:
        self.failed = False
        """The relay ends because it could not go on."""
        self.deadline: float | None = None
        """When `tick` kills the workers that are left (time.monotonic()); None: they may stay."""
        self._state = state
        self._rollout = rollout
        self._respawn = respawn
        self._status = status
        self._takeover_server = takeover_server
        self._pipes = pipes

    def stop(self, *, at_once: bool) -> None:
        """Take no new connections; finish the live ones, or reset them."""
        state = self._state
        grace = 0.0 if state.ending else self._begin()
        if state.phase is Phase.HANDED_OVER and state.interception is not None:
            state.interception.drain()  # so that its guard need not tell us to
        state.phase = Phase.DRAINING
        if at_once:
            for worker in state.workers:
                worker.stop()
            self.deadline = time.monotonic() + END_TIMEOUT
            return
        timeout = state.generation.settings.drain_timeout
        for worker in state.workers:
            worker.leave(None, grace, timeout)
        log.info("draining", extra={"live": state.workers.numbers.live, "drain_timeout": timeout})
        self.deadline = time.monotonic() + grace + timeout + END_TIMEOUT

    def _begin(self) -> float:
        """Returns the seconds for which clients may still come that were intercepted before."""
        self._state.phase = Phase.DRAINING
        self._respawn.cancel()
        systemd.notify("STOPPING=1", self._state.environ)
        grace = 0.0
        if self._state.interception is not None and not self._refuses_when_failed:
            self._state.interception.drain()
            grace = HANDSHAKE_GRACE
        self._takeover_server.close()
        self._rollout.close()
        return grace

    def fail(self) -> None:
        """Stop, because workers die again and again; the exit code tells of it."""
        self.failed = True
        self.stop(at_once=False)

    @property
    def _refuses_when_failed(self) -> bool:
        """on-failure closed: the ruleset stands, and refuses what has no listener any more."""
        return self.failed and self._state.generation.settings.on_failure == "closed"

    def hand_over(self, commit: Commit) -> None:
        """The workers of another relay are ready. Ours finish their connections; nothing is to be undone at the end."""
        state, ours = self._state, self._state.generation.listeners
        if state.interception is not None and commit.guard is not None:
            state.interception.hand_over(commit.guard, commit.pid)
        for worker in state.workers:
            worker.leave(*last_clients([one for one in ours if one.name not in commit.kept]), None)
        listeners.close_all(list(ours))
        self._status.close_public()  # that is the other one's now
        state.phase = Phase.HANDED_OVER
        self._respawn.cancel()
        log.info("handed over", extra={"pid": commit.pid, "live": state.workers.numbers.live})
        self._takeover_server.close()

    def tick(self, now: float) -> None:
        """Kill the workers that have not ended in time; `now` is time.monotonic()."""
        if self.deadline is not None and now >= self.deadline:
            self.deadline = None
            for worker in self._state.workers:
                worker.kill()

    def close(self) -> None:
        """All workers have ended: answer nobody, take the ruleset away, and write the last line of the log."""
        self._status.close()
        self._pipes.drain(LOG_TIMEOUT)
        interception = self._state.interception
        if interception is not None and not self._refuses_when_failed:
            interception.remove()  # nothing happens if another relay has it now
        numbers = self._state.workers.numbers
        log.info("stopped", extra={**numbers._asdict(), "log_dropped": self._status.log_dropped})
