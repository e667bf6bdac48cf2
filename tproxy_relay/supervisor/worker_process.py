"""One worker as the supervisor sees it: started, talked to, heard, and ended."""

import contextlib
import logging
import os
import subprocess
from collections.abc import Sequence

from tproxy_relay import errors
from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Message
from tproxy_relay.ipc.scoreboard import Numbers, Scoreboard, Traffic
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.supervisor import launch
from tproxy_relay.supervisor.generation import Prepared
from tproxy_relay.system import children

LAST_TIMEOUT = 1.0
"""Seconds for a worker to be gone after it has closed its channel, and for its last words to be read."""

log = logging.getLogger(__name__)


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
        self._failure: Message | None = None
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
        self._order("serve")

    def leave(self, names: Sequence[str] | None, grace: float, timeout: float | None) -> None:
        """Have it take no more clients, but of the listeners of these names (None: all) for `grace` seconds; its
        connections may go on for `timeout` seconds (None: as long as they like)."""
        self.leaving = True
        self._order("leave", listeners=names, grace=grace, timeout=timeout)

    def stop(self) -> None:
        """Have it reset its connections and end."""
        self.leaving = True
        self._order("stop")

    def show_live(self) -> None:
        """Have it write its connections to the log."""
        self._order("live")

    def ask(self, order: str, fd: int, **what: object) -> None:
        """Have it answer on that descriptor, which stays the caller's; it is closed without an answer if the worker is
        gone, or does not listen."""
        self._channel.send({"order": order, **what}, [fd])

    def _order(self, order: str, **what: object) -> None:
        # One that is gone is noticed by the end of its channel; one that does not read, by its silence.
        self._channel.send({"order": order, **what})

    def hear(self) -> bool:
        """Take what it says. False for its end. One that talks nonsense is killed: it is no worker of ours any more."""
        try:
            told = self._channel.receive()
            if told is None:
                return False
            for fd in told[1]:
                os.close(fd)
            self._take(told[0])
        except (ValueError, KeyError, TypeError, OverflowError):
            log.error("a worker talks nonsense", extra={"pid": self.pid})
            self.kill()
        return True

    def _take(self, told: Message) -> None:
        if told["event"] == "ready":
            self.ready = True
        elif told["event"] == "left":
            self.left = True
        elif told["event"] == "failed":
            self._failure = {"message": str(told["message"]), "exit_code": int(told["exit_code"])}

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
            return errors.of_exit_code(self._failure["exit_code"], self._failure["message"])
        self._words.ended.wait(LAST_TIMEOUT)
        return SystemRefusedError(f"a worker could not start ({how}): {self._words.last or 'it said nothing'}")


def _start(prepared: Prepared, control: int, log_end: int, words_end: int) -> "subprocess.Popen[bytes]":
    listening = [listener.sock.fileno() for listener in prepared.listeners]
    return subprocess.Popen(
        _command(prepared.command, listening),
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
