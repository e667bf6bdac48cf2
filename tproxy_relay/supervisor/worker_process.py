"""One worker as the supervisor sees it: started, sent orders, listened to, and ended."""

import contextlib
import logging
import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from tproxy_relay import errors
from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.scoreboard import Numbers, Scoreboard, Traffic
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.supervisor import launch
from tproxy_relay.supervisor.generation import Generation
from tproxy_relay.system import children
from tproxy_relay.worker import messages
from tproxy_relay.worker.messages import Event, Order

LAST_TIMEOUT = 1.0
"""Seconds for a worker to be gone after it has closed its channel, and for its last words to be read."""

log = logging.getLogger(__name__)


class Stage(Enum):
    """How far a worker has come; from each one only to a later one."""

    STARTING = 1
    READY = 2
    """It waits for the order to serve."""
    SERVING = 3
    LEAVING = 4
    """It was told to take no more clients."""
    LEFT = 5
    """It takes no more clients."""
    DISMISSED = 6
    """It has no connections, is not needed any more, and was killed."""


class WorkerEvent(NamedTuple):
    """Something that the supervisor has to act on."""

    worker: "WorkerProcess"
    ended: bool
    """True: its channel is at the end, and it is to be reaped. False: it is ready."""


class WorkerProcess:
    """The process, its channel and its slot of the scoreboard. Main thread only: the process dies with the thread that
    has started it (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(
        self,
        generation: Generation,
        scoreboard: Scoreboard,
        slot: int,
        cpu: int | None,
        pipes: LogPipes,
        events: "deque[WorkerEvent]",
    ) -> None:
        """Start it; what happens to it is appended to the events. Raises SystemRefusedError."""
        self.generation = generation.number
        self.slot = slot
        self.cpu = cpu
        """The processor that it stays on; None: any."""
        self.stall_timeout = generation.settings.stall_timeout
        """Seconds; 0: it may be silent for as long as it likes."""
        self.stage = Stage.STARTING
        self.has_served = False
        """It was told to take clients once: it may have connections, also while it leaves."""
        self.suspected = self.stalled = False
        """It was silent for too long at the last check; and at the one before, and was killed for that."""
        self._events = events
        self._failure: messages.Failed | None = None
        self._scoreboard = scoreboard
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                self._channel, control = channel.pair()
                ours.callback(self._channel.close)
                theirs.callback(control.close)
                log_end, words_end, self._words = pipes.add()
                theirs.callback(os.close, log_end)
                theirs.callback(os.close, words_end)
                self._process = _start(generation, control.fileno(), log_end, words_end)
                ours.pop_all()
            except OSError as error:
                raise SystemRefusedError(f"cannot start a worker: {error.strerror}") from error
        self.pid = self._process.pid
        self._words.belong_to(self.pid)
        self._channel.send(generation.spec.to_message(slot, cpu), scoreboard.descriptors)

    def fileno(self) -> int:
        """Readable when the worker says something, or has ended."""
        return self._channel.fileno()

    def serve(self) -> None:
        """Have it accept connections from now on."""
        self.stage = Stage.SERVING
        self.has_served = True
        self._order(messages.Serve())

    def leave(self, names: Sequence[str] | None, grace: float, timeout: float | None) -> None:
        """Have it take no more clients, but of the listeners of these names (None: all) for `grace` seconds; its
        connections may go on for `timeout` seconds (None: as long as they like)."""
        self._begin_to_leave()
        self._order(messages.Leave(None if names is None else tuple(names), grace, timeout))

    def stop(self) -> None:
        """Have it reset its connections and end."""
        self._begin_to_leave()
        self._order(messages.Stop())

    def dismiss(self) -> None:
        """Kill it: it has no connections yet, and is not needed any more."""
        self.stage = Stage.DISMISSED
        self.kill()

    @property
    def wanted(self) -> bool:
        """False once it was told to end."""
        return self.stage in (Stage.STARTING, Stage.READY, Stage.SERVING)

    @property
    def leaving(self) -> bool:
        """True once it was told to take no more clients."""
        return self.stage in (Stage.LEAVING, Stage.LEFT)

    def _begin_to_leave(self) -> None:
        if self.wanted:
            self.stage = Stage.LEAVING

    def show_live(self) -> None:
        """Have it write its connections to the log."""
        self._order(messages.LogLive())

    def list_sessions(self, fd: int, query: Mapping[str, str] | None) -> None:
        """Have it answer on that descriptor, which stays the caller's, with its live connections (None: with their
        number only) and with what it has refused. It is closed without an answer if the worker is gone, or does not
        listen."""
        self._channel.send(messages.ListSessions(query).to_message(), [fd])

    def abort_session(self, fd: int, number: str, account: int) -> None:
        """Have it reset the connection with that id for this account (uid), and answer in the same way."""
        self._channel.send(messages.Abort(number, account).to_message(), [fd])

    def _order(self, order: Order) -> None:
        # One that is gone is noticed by the end of its channel; one that does not read, by its silence.
        self._channel.send(order.to_message())

    def on_readable(self) -> None:
        """Take what it says, or note its end."""
        if not self._receive():
            self._events.append(WorkerEvent(self, ended=True))
        elif self.stage is Stage.READY:
            self._events.append(WorkerEvent(self, ended=False))

    def _receive(self) -> bool:
        """False for its end. One that talks nonsense is killed: it is no worker of ours any more."""
        try:
            received = self._channel.receive()
            if received is None:
                return False
            for fd in received[1]:
                os.close(fd)
            self._take(messages.event_of(received[0]))
        except (ValueError, KeyError, TypeError, OverflowError):
            log.error("a worker talks nonsense", extra={"pid": self.pid})
            self.kill()
        return True

    def _take(self, event: Event | None) -> None:
        match event:
            case messages.Ready() if self.stage is Stage.STARTING:
                self.stage = Stage.READY
            case messages.Left() if self.stage is Stage.LEAVING:
                self.stage = Stage.LEFT
            case messages.Failed():
                self._failure = event

    @property
    def silence(self) -> float:
        """How many seconds ago it last showed a sign of life."""
        return self._scoreboard.silence(self.slot)

    @property
    def numbers(self) -> Numbers:
        """The connections that it has counted, by its slot of the scoreboard."""
        return self._scoreboard.numbers(self.slot)

    @property
    def traffic(self) -> Traffic:
        """What its connections have carried, by its slot of the scoreboard."""
        return self._scoreboard.traffic(self.slot)

    def kill(self) -> None:
        """Send it SIGKILL; its end is an event like any other. Both ends of its connections see a reset."""
        self._process.kill()

    def reap(self) -> str:
        """After its end: give back everything but its slot. Returns how it has ended, as `exit 0` or `signal 9`."""
        self._channel.close()
        try:
            code = self._process.wait(LAST_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit {code}"

    def why_it_failed(self, how: str) -> RelayError:
        """For one that has ended before it was ready: the error that it met, as if it had happened here."""
        if self._failure is not None:
            return errors.of_exit_code(self._failure.exit_code, self._failure.message)
        self._words.ended.wait(LAST_TIMEOUT)
        return SystemRefusedError(f"a worker could not start ({how}): {self._words.last or 'it said nothing'}")


def _start(generation: Generation, control: int, log_end: int, words_end: int) -> "subprocess.Popen[bytes]":
    listening = [listener.sock.fileno() for listener in generation.listeners]
    return subprocess.Popen(
        _command(generation.pool.command, listening),
        stdin=control,
        stdout=log_end,
        stderr=words_end,
        pass_fds=listening,
        cwd="/",
        env=children.own_environment(without=children.OF_THE_MANAGER),
    )


def _command(becoming: Sequence[str], descriptors: Sequence[int]) -> list[str]:
    launcher = children.script_command(str(launch.__file__), ",".join(map(str, descriptors)))
    return [*launcher, *becoming, *children.module_command("tproxy_relay.worker")]
