"""How workers share new clients: four ways, side by side on loopback. README.md says how to run it and how to read it.

Each worker is the relay's own accept loop (tproxy_relay/worker/acceptor.py) with its threads and its shared memory;
only the way to share differs, and connections are echoed instead of relayed.
"""

import argparse
import itertools
import json
import os
import select
import signal
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import closing, suppress
from functools import partial

from tproxy_relay.ipc import scoreboard
from tproxy_relay.ipc.scoreboard import Scoreboard
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import BACKLOG, Listener
from tproxy_relay.net.sockets import PathTuning, Tuning
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.connect import SocketTuning
from tproxy_relay.relay.connection import THREADS, Connection, WorkerContext
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.relay.policy import Policy
from tproxy_relay.relay.registry import Registry
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.settings import Settings
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.system.limits import Limits
from tproxy_relay.system.wakeup import Wakeup
from tproxy_relay.worker.acceptor import Acceptor
from tproxy_relay.worker.admission import Admission
from tproxy_relay.worker.balance import Balance
from tproxy_relay.worker.hangups import Hangups

BUSY, PRESENT, WAITING, CROWDS = 32, 100, 64, (4, 16, 100, 500)
"""Clients: without a pause; while a worker is stopped; in the backlog when one is killed; that come to stay."""
PACE, LATE, PATIENCE = 0.005, 0.5, 10.0
"""Seconds: between clients that come slowly; after which a client notices that it waits; in which all must be well."""
ROOM = 4096
MESSAGE = b"m" * 128
PLAIN = PathTuning(None, 0, 0)

Measures = dict[str, float]


class Unbalanced(Balance):
    """Takes every client that the kernel wakes it for."""

    def goes_on(self) -> bool:
        return True


class Inherited(Acceptor):
    """Is woken together with all the others, as by any epoll without EPOLLEXCLUSIVE."""

    events = select.EPOLLIN


STRATEGIES = {
    "inherited": (Inherited, Unbalanced),
    "exclusive": (Acceptor, Unbalanced),
    "balanced": (Acceptor, Balance),
    "reuseport": (Acceptor, Unbalanced),
}


class Echo(Connection):
    """Echoes, in the one of its threads that a relayed connection would begin with."""

    def run(self) -> None:
        with suppress(ConnectionError), self.client_leg.sock as client:
            while data := client.recv(len(MESSAGE)):
                client.sendall(data)
        self._context.threads.release(THREADS)
        self._context.registry.remove(self, Outcome.COMPLETED.value)


class Echoes(Admission):
    """Lets in as many as a worker of the relay would."""

    def __init__(self, slot: Slot, epoll: select.epoll) -> None:
        ends = EndNotifier(slot, Wakeup())
        self._number = itertools.count()
        self._echo_context = WorkerContext(
            Settings(),
            SocketTuning(Tuning(0, 0.0, 0), PLAIN, PLAIN),
            Policy(frozenset(), None),
            Registry(slot, ends),
            ThreadPool(THREADS * ROOM),
            Hangups(epoll),
            CpuPlacement(None),
        )
        super().__init__(slot, Limits(ROOM, ROOM), ends, self._echo_context)

    def _connection(self, sock: socket.socket, client: Endpoint, listener: Listener) -> Connection:
        return Echo(str(next(self._number)), sock, client, listener, self._echo_context)


def work(strategy: str, sock: socket.socket, slot: Slot, parent: int) -> None:
    """The life of a worker: until it is killed, or has lost its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the keyboard, for the whole process group
    epoll = select.epoll()
    kind, balance = STRATEGIES[strategy]
    acceptor = kind(epoll, [Listener(sock)], balance(slot), Echoes(slot, epoll))
    acceptor.start()
    while os.getppid() == parent:
        for fd, _ in epoll.poll(1.0 if acceptor.due is None else max(0.0, acceptor.due - time.monotonic())):
            acceptor.on_readable(fd)
        acceptor.keep_time(time.monotonic())


class Fleet:
    """Workers that share in one of the ways, and what a supervisor does for them. A worker's number is its place's."""

    def __init__(self, strategy: str, workers: int) -> None:
        self._strategy, self._scoreboard = strategy, Scoreboard.create(ROOM)
        self._sockets = [_listen()]
        self.address = self._sockets[0].getsockname()
        for _ in range(workers - 1):
            self._sockets.append(_listen(self.address[1]) if strategy == "reuseport" else self._sockets[0])
        self.pids: dict[int, int] = {}
        for _ in self._sockets:
            self.start()

    def start(self) -> None:
        """A worker, in the first place that is free, on the socket that belongs to it; returns when it watches."""
        number = self._scoreboard.claim()
        assert number is not None
        slot = Slot(self._scoreboard, number)
        parent = os.getpid()
        self.pids[number] = os.fork()
        if not self.pids[number]:
            try:
                work(self._strategy, self._sockets[number], slot, parent)
            finally:
                os._exit(1)
        deadline = time.monotonic() + PATIENCE
        while slot.state != scoreboard.WATCHING and time.monotonic() < deadline:
            time.sleep(0.001)

    def signal(self, number: int, what: signal.Signals) -> None:
        """Returns when a stopped worker stands still, and when a killed one is gone."""
        os.kill(self.pids[number], what)
        if what != signal.SIGCONT:
            os.waitpid(self.pids[number], os.WUNTRACED)
        if what == signal.SIGKILL:
            self._scoreboard.clear(number)
            del self.pids[number]

    def share(self) -> float:
        """Connections of the worker that has most, as a multiple of its fair share."""
        live = [self._scoreboard.numbers(number).live for number in self.pids]
        return max(live) / statistics.mean(live)

    def cpu(self) -> float:
        """Seconds that the workers have used; clock_getcpuclockid(3) makes the clock of a process from its pid."""
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.pids.values())

    def close(self) -> None:
        """Kill them all."""
        for number in list(self.pids):
            self.signal(number, signal.SIGKILL)
        for sock in self._sockets:
            sock.close()
        self._scoreboard.close()


def _listen(port: int = 0) -> socket.socket:
    sock = socket.create_server(("127.0.0.1", port), backlog=BACKLOG, reuse_port=True)
    sock.setblocking(False)
    return sock


class Clients:
    """Connections that ask, and how long each waits for its answer. The kernel alone completes their handshakes."""

    def __init__(self, fleet: Fleet, count: int, pace: float = 0.0) -> None:
        """So many, with so many seconds between them."""
        self._address, self._epoll = fleet.address, select.epoll()
        self._asked: dict[int, float] = {}
        self.socks: dict[int, socket.socket] = {}
        self.waits: list[float] = []
        for _ in range(count):
            self.open()
            deadline = time.monotonic() + pace
            while (left := deadline - time.monotonic()) > 0:
                self.answered(left)

    def open(self) -> None:
        """One more; its wait begins before connect()."""
        began = time.monotonic()
        sock = socket.create_connection(self._address)
        self.socks[sock.fileno()] = sock
        self._epoll.register(sock, select.EPOLLIN)
        self.ask(sock.fileno())
        self._asked[sock.fileno()] = began

    def ask(self, fd: int) -> None:
        """Something."""
        self._asked[fd] = time.monotonic()
        self.socks[fd].send(MESSAGE)

    def reopen(self, fd: int) -> None:
        """Close it, and open another one."""
        self.socks.pop(fd).close()
        self.open()

    def answered(self, seconds: float) -> list[int]:
        """Those who get their answers next. One that is reset will wait for ever."""
        fds = []
        for fd, events in self._epoll.poll(seconds):
            if events == select.EPOLLIN and self.socks[fd].recv(len(MESSAGE)):
                self.waits.append(time.monotonic() - self._asked.pop(fd))
                fds.append(fd)
            else:
                self._epoll.unregister(fd)
        return fds

    def keep_busy(self, seconds: float, again: Callable[[int], None]) -> float:
        """Whoever gets an answer does that. Returns answers per second."""
        before, deadline = len(self.waits), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            for fd in self.answered(left):
                again(fd)
        return (len(self.waits) - before) / seconds

    def unserved(self, seconds: float) -> int:
        """How many have no answer after so long; `waits` has them with what they waited by then."""
        deadline = time.monotonic() + seconds
        while self._asked and (left := deadline - time.monotonic()) > 0:
            self.answered(left)
        self.waits += [time.monotonic() - began for began in self._asked.values()]
        return len(self._asked)

    def close(self) -> None:
        """Let all of them go."""
        for sock in self.socks.values():
            sock.close()
        self._epoll.close()


def short_connections(fleet: Fleet, seconds: float) -> Measures:
    """Each client connects, exchanges one message and closes, again and again."""
    cpu = fleet.cpu()
    with closing(Clients(fleet, BUSY)) as clients:
        rate = clients.keep_busy(seconds, clients.reopen)
    percentiles = statistics.quantiles(clients.waits, n=100)
    return {
        "new connections/s": rate,
        "connect + exchange, p50 ms": 1e3 * percentiles[49],
        "connect + exchange, p99 ms": 1e3 * percentiles[98],
        "CPU s per 1000 connections": 1e3 * (fleet.cpu() - cpu) / len(clients.waits),
    }


def echoes(fleet: Fleet, seconds: float) -> Measures:
    """Connections that stay, each with one message on its way."""
    with closing(Clients(fleet, BUSY, PACE)) as clients:
        clients.unserved(PATIENCE)
        for fd in clients.socks:
            clients.ask(fd)
        return {f"echoes/s, {BUSY} long connections": clients.keep_busy(seconds, clients.ask)}


def crowd(fleet: Fleet, count: int, pace: float) -> Measures:
    """Clients that come to stay."""
    with closing(Clients(fleet, count, pace)) as clients:
        if clients.unserved(PATIENCE):
            raise TimeoutError("a client was not served")
        return {f"largest share, {count} come {'slowly' if pace else 'at once'}": fleet.share()}


def one_stopped(fleet: Fleet) -> Measures:
    """Clients come to stay while one worker stands still."""
    fleet.signal(0, signal.SIGSTOP)
    with closing(Clients(fleet, PRESENT, PACE)) as clients:
        clients.unserved(2 * LATE)
    return {
        f"one stopped: % wait over {LATE} s": 100 * sum(wait > LATE for wait in clients.waits) / PRESENT,
        "one stopped: median wait, ms": 1e3 * statistics.median(clients.waits),
    }


def one_killed(fleet: Fleet) -> Measures:
    """Clients wait in the backlog while all workers stand still; then one dies, and the others go on."""
    for number in fleet.pids:
        fleet.signal(number, signal.SIGSTOP)
    with closing(Clients(fleet, WAITING)) as clients:
        fleet.signal(0, signal.SIGKILL)
        for number in fleet.pids:
            fleet.signal(number, signal.SIGCONT)
        without = clients.unserved(2 * LATE)
        fleet.start()
        with_another = clients.unserved(2 * LATE)
    return {
        "one killed: % unserved without it": 100 * without / WAITING,
        "one killed: % unserved, replaced": 100 * with_another / WAITING,
    }


def measure(strategy: str, workers: int, seconds: float) -> Measures:
    """Everything, each with fresh workers."""
    parts: list[Callable[[Fleet], Measures]] = [partial(part, seconds=seconds) for part in (short_connections, echoes)]
    parts += [partial(crowd, count=count, pace=pace) for pace in (PACE, 0.0) for count in CROWDS]
    measures: Measures = {}
    for part in [*parts, one_stopped, one_killed]:
        with closing(Fleet(strategy, workers)) as fleet:
            measures |= part(fleet)
    return measures


def print_table(workers: str, rounds: list[dict[str, Measures]]) -> None:
    """Medians; behind them in brackets, where one can divide, the medians of the ratios to the first way."""
    print(f"{workers} workers, {len(rounds)} rounds".ljust(38), *(f"{name:>17}" for name in STRATEGIES))
    first = next(iter(STRATEGIES))
    for what in rounds[0][first]:
        cells = []
        for name in STRATEGIES:
            value = statistics.median(ways[name][what] for ways in rounds)
            ratios = [ways[name][what] / ways[first][what] for ways in rounds if ways[first][what]]
            ratio = f" ({statistics.median(ratios):.2f})" if ratios else ""
            cells.append(f"{value:.{0 if value >= 100 else 2}f}{ratio}".rjust(17))
        print(what.ljust(38), *cells)


def main() -> None:
    """Measure, and print. The ways take turns, so that whatever else the machine does meets all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each measurement of a rate")
    parser.add_argument("--workers", default="2,4", help="numbers of workers, with commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="the measures of each round, instead of the table")
    options = parser.parse_args()
    rounds = [
        {n: {way: measure(way, int(n), options.seconds) for way in STRATEGIES} for n in options.workers.split(",")}
        for _ in range(options.rounds)
    ]
    if options.json:
        print(json.dumps(rounds, indent=1))
        return
    for n in rounds[0]:
        print_table(n, [by_number[n] for by_number in rounds])


if __name__ == "__main__":
    main()
