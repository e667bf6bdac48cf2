"""Workers to try: one in a thread, whose inside can be looked at, or some processes that share their listeners."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import children
import lines as lines_module
import loopback
import slots
from deadlines import PATIENCE, wait_until
from lines import Lines

from tproxy_relay.ipc import channel, scoreboard
from tproxy_relay.net import endpoint, sockets
from tproxy_relay.net.listeners import Listener
from tproxy_relay.relay.policy import Policy
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor import launch
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.system.limits import Limits
from tproxy_relay.worker import messages
from tproxy_relay.worker.messages import Order
from tproxy_relay.worker.spec import WorkerSpec
from tproxy_relay.worker.worker import Worker

SERVED_BY_A_WAKE_UP = 0.05
"""Seconds. Half of the time after which a worker that was not woken looks by itself."""


def median(seconds: list[float]) -> float:
    """The middle one, for a busy machine makes some slow."""
    return sorted(seconds)[len(seconds) // 2]


class FlakyListener:
    """A real listening socket whose accept() fails first, as often and with what it was told."""

    def __init__(self, real: socket.socket) -> None:
        self._real = real
        self.errors: list[int] = []
        self.calls = 0

    def accept(self) -> tuple[socket.socket, object]:
        """accept(2), or the next error."""
        self.calls += 1
        if self.errors:
            number = self.errors.pop(0)
            raise OSError(number, os.strerror(number))
        return self._real.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


class Peers:
    """Clients of some listeners, and a server that says nothing of its own accord."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.server = self._stack.enter_context(loopback.listen(backlog=1024))
        self.addresses: list[endpoint.Endpoint] = []

    @property
    def policy(self) -> Policy:
        """All go to the server."""
        own_ports = frozenset(one.port for one in self.addresses)
        return Policy(own_ports, endpoint.from_sockaddr(self.server.getsockname()))

    def listen(self) -> Listener:
        """A listener as it comes from the supervisor."""
        raw = loopback.listen(backlog=1024)
        raw.setblocking(False)
        sockets.tune(raw, loopback.UNTUNED)
        listener = Listener(raw)
        self.addresses.append(listener.endpoint)
        return listener

    def dial(self, number: int = 0, source: str = "") -> socket.socket:
        """A client; closed at the end."""
        host, port = self.addresses[number][:2]
        return self._stack.enter_context(loopback.dial((host, port), source=source))

    def serve(self) -> socket.socket:
        """The server's end of the next connection."""
        return self._stack.enter_context(self.server.accept()[0])

    def connect(self, source: str = "") -> tuple[socket.socket, socket.socket]:
        """A client and the server's end, relayed. One at a time, so that the two belong together."""
        client = self.dial(source=source)
        server = self.serve()
        server.sendall(b"!")
        assert client.recv(1) == b"!"
        return client, server


class Running(Peers):
    """A Worker in a thread, with a scoreboard of its own."""

    def __init__(
        self,
        *,
        max_connections: int = 10,
        room: int | None = None,
        start: bool = True,
        listeners: int = 1,
        target: endpoint.Endpoint | None = None,
        **settings: object,
    ) -> None:
        """`target`: where all go, in place of the server."""
        super().__init__()
        self.lines: Lines = self._stack.enter_context(lines_module.collected())
        (self.slot,) = self._stack.enter_context(slots.slots())
        self.control, theirs = channel.pair()
        self._stack.callback(self.control.close)
        self._stack.callback(theirs.close)
        self.flaky: list[FlakyListener] = []
        made = [self._flaky_listener() for _ in range(listeners)]
        policy = Policy(frozenset(), target) if target else self.policy
        limits = Limits(max_connections, room or max_connections)
        self.worker = Worker(
            WorkerSpec(Settings(**settings), loopback.UNTUNED, policy, limits),  # type: ignore[arg-type]
            made,
            theirs,
            self.slot,
            CpuPlacement(None),
            lambda: 0,
        )
        self._stack.callback(self.worker.wakeup.close)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="worker")
        if start:
            self.thread.start()

    def _flaky_listener(self) -> Listener:
        listener = self.listen()
        self.flaky.append(FlakyListener(listener.sock))
        listener.sock = self.flaky[-1]  # type: ignore[assignment]
        return listener

    def _run(self) -> None:
        try:
            self.worker.run()
        except BaseException as error:
            self.error = error

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.thread.is_alive():
            self.order(messages.Stop())
            self.thread.join(PATIENCE)
        alive = self.thread.is_alive()
        self._stack.close()
        threading.stack_size(0)
        assert not alive, "the worker did not stop"

    def order(self, order: Order | None) -> None:
        """As the supervisor gives it; None: it is gone itself."""
        if order is None:
            self.control.close()
        else:
            self.control.send(order.to_message())

    def leave(self, *, listeners: list[str] | None = None, grace: float = 0.0, timeout: float | None = 30.0) -> None:
        """The order to finish and end."""
        self.order(messages.Leave(None if listeners is None else tuple(listeners), grace, timeout))

    @property
    def full(self) -> object:
        """Why it accepts nothing, as far as it knows."""
        return self.worker.debug_state()["full"]

    @property
    def left(self) -> bool:
        """True once it has closed all its listeners."""
        return not self.worker.debug_state()["listening"]

    @property
    def leaving(self) -> object:
        """True once it has begun to."""
        return self.worker.debug_state()["leaving"]

    @property
    def trimming(self) -> object:
        """True while its clock waits for threads that nobody needs any more."""
        return self.worker.debug_state()["trimming"]

    def await_end(self, seconds: float = PATIENCE) -> None:
        """The worker has returned."""
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"the worker did not stop within {seconds} s"
        if self.error:
            raise self.error


class WorkerProcess:
    """One worker as the supervisor starts it."""

    def __init__(self, number: int, spec: WorkerSpec, listener: Listener, scoreboard: tuple[int, int]) -> None:
        self.lines: list[dict[str, object]] = []
        self.control, theirs = channel.pair()
        fd = listener.sock.fileno()
        command = [sys.executable, "-I", "-S", str(launch.__file__), str(fd)]
        self.child = subprocess.Popen(
            [*command, sys.executable, "-m", "tproxy_relay.worker"],
            stdin=theirs.fileno(),
            stdout=subprocess.PIPE,
            pass_fds=[fd],
            env=children.environment(),
            start_new_session=True,
        )
        theirs.close()
        self._reader = threading.Thread(target=self._read, name="log reader")
        self._reader.start()
        self.control.send(spec.to_message(number, None), scoreboard)

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.append(json.loads(line))

    def serve(self) -> None:
        """Once it is ready."""
        told = self.control.receive(20)
        assert told is not None and messages.event_of(told[0]) == messages.Ready()
        self.control.send(messages.Serve().to_message())

    def leave(self) -> None:
        """Have it finish its connections."""
        self.control.send(messages.Leave((), 0.0, None).to_message())

    def said(self, message: str) -> list[dict[str, object]]:
        """The lines with this message."""
        return [line for line in list(self.lines) if line["message"] == message]

    def stand_still(self) -> None:
        """Until SIGCONT."""
        self.child.send_signal(signal.SIGSTOP)
        stat = Path(f"/proc/{self.child.pid}/stat")  # proc(5)
        wait_until(lambda: stat.read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T", "it stands still")

    def close(self) -> None:
        """After whatever has become of it."""
        self.child.kill()
        self.child.wait(PATIENCE)
        self._reader.join(PATIENCE)
        assert self.child.stdout is not None
        self.child.stdout.close()
        self.control.close()


class Several(Peers):
    """Worker processes that share a listener, and a scoreboard that shows what they do."""

    def __init__(self, count: int = 2, *, most: int = 1000, room: int = 500, **settings: object) -> None:
        super().__init__()
        self.slots = self._stack.enter_context(slots.slots(count, room))
        self.scoreboard = self.slots[0].scoreboard
        listener = self.listen()
        self._stack.callback(listener.close)
        chosen = Settings(mode="redirect", log_format="json", **settings)  # type: ignore[arg-type]
        spec = WorkerSpec(chosen, loopback.UNTUNED, self.policy, Limits(most, room))
        self.workers: list[WorkerProcess] = []
        for number in range(count):
            worker = WorkerProcess(number, spec, listener, self.scoreboard.descriptors)
            self._stack.callback(worker.close)
            self.workers.append(worker)

    def __enter__(self) -> "Several":
        try:
            for worker in self.workers:
                worker.serve()
            wait_until(lambda: all(self.states), "all watch the listener")
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    @property
    def states(self) -> list[int]:
        """What each does about new clients."""
        return [slot.state for slot in self.slots]

    @property
    def live(self) -> list[int]:
        """Connections of each."""
        return [slot.live for slot in self.slots]

    @property
    def accepted(self) -> int:
        """Connections so far."""
        return sum(slot.numbers.accepted for slot in self.slots)

    def closed(self, outcome: str) -> int:
        """Connections that have ended so."""
        return sum(slot.numbers.closed.get(outcome, 0) for slot in self.slots)

    def hold(self, number: int, count: int) -> list[socket.socket]:
        """Connections of one worker, while the others stand still; the clients' ends."""
        others = [one for one in range(len(self.workers)) if one != number]
        for one in others:
            self.workers[one].stand_still()
            self.slots[one].state = scoreboard.ABSENT  # else clients would be left to it
        held = [self.connect()[0] for _ in range(count)]
        assert self.live[number] >= count
        for one in others:
            self.slots[one].state = scoreboard.WATCHING
            self.workers[one].child.send_signal(signal.SIGCONT)
        return held
