"""Real workers, started as the supervisor starts them, by a test in the place of the supervisor."""

import json
import os
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import fields as fields_of
from dataclasses import replace
from typing import Any

import lines as lines_module
import loopback
from deadlines import PATIENCE, wait_until
from lines import fields

from tproxy_relay.ipc.channel import Message
from tproxy_relay.ipc.scoreboard import WATCHING, Scoreboard
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.logs.worker_pipes import LogPipes
from tproxy_relay.net import listeners
from tproxy_relay.settings import HostPort, Settings
from tproxy_relay.supervisor.generation import Pool, prepare
from tproxy_relay.supervisor.worker_process import Stage, WorkerProcess
from tproxy_relay.supervisor.workers import CHECK_INTERVAL, Workers


class Log:
    """In the place of the LogWriter."""

    dropped = 0

    def __init__(self) -> None:
        self.text = b""

    def pass_on(self, lines: bytes) -> None:
        """As LogWriter's."""
        self.text += lines

    @property
    def lines(self) -> list[Message]:
        """What the workers have logged."""
        return [json.loads(line) for line in self.text.splitlines()]


class Hands:
    """Workers, and the little of a supervisor that it takes to have some workers in it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.said = self._stack.enter_context(lines_module.collected())
        self.server = self._stack.enter_context(loopback.listen())
        target = HostPort(*self.server.getsockname())
        settings = Settings(bind=("127.0.0.1",), ports=(0,), mode="redirect", log_format="json", target=target)
        self.generation = prepare(replace(settings, max_connections=50), [], number=1, inherited=False)
        self._stack.callback(listeners.close_all, list(self.generation.listeners))
        self.address = self.generation.listeners[0].endpoint
        self.selector = self._stack.enter_context(selectors.DefaultSelector())
        self.scoreboard = Scoreboard.create(50)
        self._stack.callback(self.scoreboard.close)
        self.log = Log()
        self.pipes = LogPipes(self.log)  # type: ignore[arg-type]
        self.workers = Workers(self.selector, self.scoreboard, self.pipes)
        self._clock = time.monotonic()
        self.how: dict[int, str] = {}

    def close(self) -> None:
        """Whatever is left."""
        self.workers.dismiss(self.workers)
        self.turn_until(lambda: not len(self.workers), "all are gone")
        self.pipes.close(PATIENCE)
        self._stack.close()

    def turn_until(self, happened: Callable[[], object], what: str) -> None:
        """Hear the workers until then."""

        def turn() -> object:
            for key, _ in self.selector.select(0.001):
                key.data()
                for event in self.workers.take_events():
                    if event.ended:
                        self.how[event.worker.pid] = self.workers.reap(event.worker)
            return happened()

        wait_until(turn, what, 4 * PATIENCE)

    def start(self, count: int = 1, **changed: Any) -> list[WorkerProcess]:
        """Some more workers, with other settings or another pool."""
        of_pool = {field.name for field in fields_of(Pool)} & set(changed)
        pool = replace(self.generation.pool, **{name: changed[name] for name in of_pool})
        settings = {name: changed[name] for name in set(changed) - of_pool}
        generation = replace(self.generation, pool=pool, settings=replace(self.generation.settings, **settings))
        before = set(self.workers)
        for _ in range(count):
            self.workers.start(generation)
        return [worker for worker in self.workers if worker not in before]

    def ready(self, worker: WorkerProcess) -> None:
        """It waits for the order to serve."""
        self.turn_until(lambda: worker.stage is Stage.READY, "it is ready")

    def serving(self, count: int = 1, **changed: Any) -> list[WorkerProcess]:
        """Some more that take clients."""
        workers = self.start(count, **changed)
        self.turn_until(lambda: all(worker.stage is Stage.READY for worker in workers), "they are ready")
        for worker in workers:
            worker.serve()
        slots = [Slot(self.scoreboard, worker.slot) for worker in workers]
        wait_until(lambda: all(slot.state == WATCHING for slot in slots), "they serve")
        return workers

    def ended(self, worker: WorkerProcess) -> str:
        """How it has."""
        self.turn_until(lambda: worker.pid in self.how, "it has ended")
        return self.how[worker.pid]

    def connect(self) -> tuple[socket.socket, socket.socket]:
        """A client and the server's end, relayed."""
        client = self._stack.enter_context(loopback.dial(self.address[:2]))
        server = self._stack.enter_context(self.server.accept()[0])
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        return client, server

    def threads(self, worker: WorkerProcess) -> list[tuple[set[int], int]]:
        """Where each of its threads may run, and the policy that it runs under."""
        found = []
        for name in os.listdir(f"/proc/{worker.pid}/task"):
            with suppress(ProcessLookupError):  # spare ones end
                found.append((os.sched_getaffinity(int(name)), os.sched_getscheduler(int(name))))
        return found

    def check(self, times: int, interval: float = CHECK_INTERVAL) -> None:
        """As the supervisor does every second, by a clock that goes on only here."""
        for _ in range(times):
            self._clock += interval
            self.workers.kill_stalled(self._clock)

    def logged(self, message: str) -> list[Message]:
        """Our own lines with this message."""
        return [fields(record) for record in self.said.of(message)]
