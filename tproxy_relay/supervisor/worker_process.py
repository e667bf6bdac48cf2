"""One worker as the supervisor sees it: started, talked to, heard, and ended."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tproxy_relay import errors
from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.scoreboard import Numbers, Scoreboard, Traffic
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.supervisor import launch
from tproxy_relay.supervisor.generation import Prepared
from tproxy_relay.worker import messages
from tproxy_relay.worker.messages import Event, Order

LAST_TIMEOUT = 1.0
"""Seconds for a worker to be gone after it has closed its channel, and for its last words to be read."""

log = logging.getLogger(__name__)

_OF_THE_MANAGER = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"})
"""sd_notify(3), sd_watchdog_enabled(3): the supervisor's."""


class WorkerProcess:
    """The process, its channel and its slot of the scoreboard. Main thread only: the process dies with the thread that
    has started it (prctl(2), PR_SET_PDEATHSIG)."""

    def __init__(
        self, prepared: Prepared, generation: int, scoreboard: Scoreboard, slot: int, cpu: int | None, pipes: LogPipes
    ) -> None:
        """Start it. Raises SystemRefusedError."""
        self.generation = generation
        self.slot = slot
        self.cpu = cpu
        """The processor that it stays on; None: any."""
        self.stall_timeout = prepared.settings.stall_timeout
        """Seconds; 0: it may be silent for as long as it likes."""
        self.ready = self.serving = self.leaving = self.left = self.suspected = self.stalled = self.unwanted = False
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
                self._process = _start(prepared, control.fileno(), log_end, words_end)
                ours.pop_all()
            except OSError as error:
                raise SystemRefusedError(f"cannot start a worker: {error.strerror}") from error
        self.pid = self._process.pid
        self._words.belong_to(self.pid)
        self._channel.send(prepared.spec.to_message(slot, cpu), scoreboard.descriptors)

    def fileno(self) -> int:
        """Readable when the worker says something, or has ended."""
        return self._channel.fileno()

    def serve(self) -> None:
        """Have it accept connections."""
        self.serving = True
        self._order(messages.Serve())

    def leave(self, names: Sequence[str] | None, grace: float, timeout: float | None) -> None:
        """Have it take no more clients, but of the listeners of these names (None: all) for `grace` seconds; its
        connections may go on for `timeout` seconds (None: as long as they like)."""
        self.leaving = True
        self._order(messages.Leave(None if names is None else tuple(names), grace, timeout))

    def stop(self) -> None:
        """Have it reset its connections and end."""
        self.leaving = True
        self._order(messages.Stop())

    def show_live(self) -> None:
        """Have it write its connections to the log."""
        self._order(messages.LogLive())

    def ask(self, order: str, fd: int, **what: object) -> None:
        """Have it answer on that descriptor, which stays the caller's; it is closed without an answer if the worker is
        gone, or does not listen."""
        self._channel.send(messages.order_of({"order": order, **what}).to_message(), [fd])

    def _order(self, order: Order) -> None:
        # One that is gone is noticed by the end of its channel; one that does not read, by its silence.
        self._channel.send(order.to_message())

    def hear(self) -> bool:
        """Take what it says. False for its end. One that talks nonsense is killed: it is no worker of ours any more."""
        try:
            told = self._channel.receive()
            if told is None:
                return False
            for fd in told[1]:
                os.close(fd)
            self._take(messages.event_of(told[0]))
        except (ValueError, KeyError, TypeError, OverflowError):
            log.error("a worker talks nonsense", extra={"pid": self.pid})
            self.kill()
        return True

    def _take(self, event: Event) -> None:
        match event:
            case messages.Ready():
                self.ready = True
            case messages.Left():
                self.left = True
            case messages.Failed():
                self._failure = event

    @property
    def silence(self) -> float:
        """Seconds since it last showed a sign of life."""
        return self._scoreboard.silence(self.slot)

    @property
    def numbers(self) -> Numbers:
        """What it has counted."""
        return self._scoreboard.numbers(self.slot)

    @property
    def traffic(self) -> Traffic:
        """What its connections have carried."""
        return self._scoreboard.traffic(self.slot)

    def kill(self) -> None:
        """At once; its end is heard like any other. Both ends of its connections see a reset."""
        self._process.kill()

    def reap(self) -> str:
        """After its end was heard: give back everything but its slot. Returns how it went."""
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


def environment() -> dict[str, str]:
    """Ours without the service manager, and so that the same program runs, also from a checkout that is not
    installed."""
    package = str(Path(__file__).parents[2])
    path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {name: value for name, value in os.environ.items() if name not in _OF_THE_MANAGER}
    return {**ours, "PYTHONPATH": os.pathsep.join(path)}


def _start(prepared: Prepared, control: int, log_end: int, words_end: int) -> "subprocess.Popen[bytes]":
    listening = [listener.sock.fileno() for listener in prepared.listeners]
    return subprocess.Popen(
        _command(prepared.command, listening),
        stdin=control,
        stdout=log_end,
        stderr=words_end,
        pass_fds=listening,
        cwd="/",
        env=environment(),
    )


def _command(becoming: Sequence[str], descriptors: Sequence[int]) -> list[str]:
    launcher = [sys.executable, "-I", "-S", str(launch.__file__), ",".join(map(str, descriptors))]
    return [*launcher, *becoming, sys.executable, "-m", "tproxy_relay.worker"]
