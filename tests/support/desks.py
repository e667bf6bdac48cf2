"""Connections without a worker: what they need of one, and whoever takes their clients in."""

import select
import socket
import threading

import loopback
import slots
from deadlines import PATIENCE, wait_until
from lines import Lines
from loopback import RST

from tproxy_relay.net import endpoint, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.net.sockets import PathTuning
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.connect import SocketTuning
from tproxy_relay.relay.connection import THREADS, Connection, WorkerContext
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.relay.policy import Policy
from tproxy_relay.relay.registry import Registry
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.settings import Settings
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.system.wakeup import Wakeup
from tproxy_relay.worker.hangups import Hangups

PLAIN = PathTuning(None, 0, 0)


class Desk:
    """What a worker has, without its accept loop: a listener, threads, a registry, the epoll of hang-ups."""

    def __init__(self, settings: Settings, target: Endpoint | None, own_ports: frozenset[int] | None = None) -> None:
        raw = loopback.listen()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sockets.tune(raw, loopback.UNTUNED)
        self.listener = Listener(raw)
        self._slots = slots.slots()
        (self.slot,) = self._slots.__enter__()
        self._wakeup = Wakeup()
        self.registry: Registry[Connection] = Registry(self.slot, EndNotifier(self.slot, self._wakeup), max_refused=3)
        self.threads = ThreadPool(limit=8, spare=2)
        self._ended = 0
        self._epoll = select.epoll()
        self._hangups = Hangups(self._epoll)
        ports = frozenset({self.listener.endpoint.port}) if own_ports is None else own_ports
        policy = Policy.of_settings(settings, ports, target)
        self.context = WorkerContext(
            settings,
            SocketTuning(loopback.UNTUNED, PLAIN, PLAIN),
            policy,
            self.registry,
            self.threads,
            self._hangups,
            CpuPlacement(None),
        )
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watch")
        self._watcher.start()
        self._count = 0

    def _watch(self) -> None:
        while not self._closing.is_set():
            for fd, _events in self._epoll.poll(0.02):
                self._hangups.on_readable(fd)
            self._hangups.settle()

    def close(self) -> None:
        """Give everything back. Connections must have ended."""
        for left in self.registry.live():
            left.abort(Outcome.ABORTED)
        wait_until(lambda: not len(self.registry), "all connections end")
        self.threads.close()
        self.listener.close()
        self._closing.set()
        self._watcher.join(PATIENCE)
        self._epoll.close()
        self._wakeup.close()
        self._slots.__exit__(None, None, None)
        threading.stack_size(0)

    def accept(self) -> Connection:
        """Take the next client in, without running it."""
        sock, sockaddr = self.listener.sock.accept()
        sock.setblocking(True)
        self._count += 1
        made = Connection(f"c{self._count}", sock, endpoint.from_sockaddr(sockaddr), self.listener, self.context)
        assert self.threads.reserve(THREADS)
        self.registry.add(made)
        return made

    def start(self) -> Connection:
        """Take the next client in and run it."""
        made = self.accept()
        self.threads.run(made.run)
        return made

    def dial(self, receive_buffer: int = 0) -> socket.socket:
        """A client."""
        host, port = self.listener.endpoint[:2]
        return loopback.dial((host, port), receive_buffer=receive_buffer)

    def await_end(self) -> None:
        """One more connection has given everything back."""
        self._ended += 1
        wait_until(lambda: sum(self.slot.numbers.closed.values()) >= self._ended, "the connection ends")


class DeskMaker:
    """Makes desks and closes them after the test."""

    def __init__(self) -> None:
        self.made: list[Desk] = []

    def __call__(
        self, target: Endpoint | None = None, own_ports: frozenset[int] | None = None, **settings: object
    ) -> Desk:
        self.made.append(Desk(Settings(**settings), target, own_ports))  # type: ignore[arg-type]
        return self.made[-1]


def target_of(server: socket.socket) -> Endpoint:
    """The server's address, as a target."""
    return endpoint.from_sockaddr(server.getsockname())


def assert_refused(desk: Desk, client: socket.socket, lines: Lines, outcome: str, level: int) -> dict[str, object]:
    assert loopback.read_to_end(client) == (b"", RST)
    (line,) = lines.closed()
    assert line["outcome"] == outcome
    assert (line["bytes_up"], line["bytes_down"]) == (0, 0)
    assert line["error"]
    assert lines.of("connection closed")[0].levelno == level
    desk.await_end()
    assert desk.slot.numbers.closed == {outcome: 1}
    assert len(desk.registry) == 0
    return line
