"""A worker: one main thread, one epoll, and a pool of threads that do the relaying.

The main thread owns the listeners (acceptor.py), the orders of the supervisor and the clock; it never touches a byte of
anybody's traffic. In its epoll are the listeners, the wake-up, the channel to the supervisor, and the sockets
that hangups.py watches.
"""

import contextlib
import errno
import json
import logging
import select
import socket
import time
from collections.abc import Callable, Mapping

from tproxy_relay import session_query
from tproxy_relay.errors import ConfigError
from tproxy_relay.ipc.channel import Channel
from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net import sockets
from tproxy_relay.net.listeners import Listener
from tproxy_relay.net.sockets import SEND_TICK, PathTuning
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import snapshot
from tproxy_relay.relay.connect import SocketTuning
from tproxy_relay.relay.connection import THREADS, Connection, WorkerContext
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.relay.registry import Registry
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.settings import Settings
from tproxy_relay.system.cpu import CpuPlacement
from tproxy_relay.system.wakeup import Wakeup
from tproxy_relay.worker import messages, sessions
from tproxy_relay.worker.acceptor import Acceptor
from tproxy_relay.worker.admission import Admission
from tproxy_relay.worker.balance import Balance
from tproxy_relay.worker.hangups import Hangups
from tproxy_relay.worker.messages import Leave
from tproxy_relay.worker.spec import WorkerSpec

SAMPLE_INTERVAL = 1.0
"""Seconds between two samples of what the connections have moved, at least."""
SAMPLE_SHARE = 200
"""So many times as long as a sample takes is the time between two: with 5,000 connections, a little over a second."""
HANGUP_INTERVAL = 0.05
"""Seconds between two checks of a reset that must not overtake data."""
ABORT_GRACE = SEND_TICK + 0.5
"""Seconds that aborted connections get to end: a stuck send() notices within SEND_TICK."""
BEATS_IN_STALL = 4
"""Signs of life in the time after which the supervisor takes a worker for stalled."""

log = logging.getLogger(__name__)


class Worker:
    """Accepts and relays until it is told to stop."""

    def __init__(
        self,
        spec: WorkerSpec,
        open_listeners: list[Listener],
        control: Channel,
        slot: Slot,
        cpu: CpuPlacement,
        log_dropped: Callable[[], int],
    ) -> None:
        """`log_dropped` returns how many log records were lost. Raises ConfigError for what this process may not
        set."""
        settings = spec.settings
        tuning = SocketTuning(spec.tuning, *_paths(settings))  # before there are threads
        self._control = control
        self._slot = slot
        self._log_dropped = log_dropped
        self.wakeup = Wakeup()
        """Connections use it up to their last moment, so it stays open until whoever has run the worker closes it."""
        self._epoll = select.epoll()
        self._hangups = Hangups(self._epoll)
        self._threads = ThreadPool(THREADS * spec.limits.room)
        self._ends = EndNotifier(slot, self.wakeup)
        self._registry: Registry[Connection] = Registry(
            slot, self._ends, share_sources=settings.max_per_source > 0, max_refused=session_query.MAX_REFUSED
        )
        context = WorkerContext(settings, tuning, spec.policy, self._registry, self._threads, self._hangups, cpu)
        self._admission = Admission(slot, spec.limits, self._ends, context)
        self._balance = Balance(slot)
        self._acceptor = Acceptor(self._epoll, open_listeners, self._balance, self._admission)
        self._sweep_interval = _sweep_interval(settings)
        self._beat_interval = settings.stall_timeout / BEATS_IN_STALL
        self._sweep_at = self._sampled_at = self._sample_at = 0.0
        self._undecided = False
        self._leave: Leave | None = None
        self._at_once = False

    @property
    def live(self) -> list[Connection]:
        """The connections that are live now, oldest first."""
        return self._registry.live()

    def debug_state(self) -> dict[str, object]:
        """What it is about, for tests: whether it leaves, the listeners that it has, why it accepts nobody, and whether
        its clock waits for threads to be trimmed."""
        return {
            "leaving": self._balance.leaving,
            "listening": self._acceptor.listening,
            "full": self._admission.full,
            "trimming": self._admission.due is not None,
        }

    def run(self) -> None:
        """Until the supervisor says `leave` or `stop`, or is gone; then everything is closed and every connection
        recorded. Raises OSError if a listener breaks."""
        self._epoll.register(self.wakeup.fileno(), select.EPOLLIN)
        self._epoll.register(self._control.fileno(), select.EPOLLIN)
        self._acceptor.start()
        try:
            while self._leave is None and not self._at_once:
                self._turn(None)
            self._serve_latecomers()
            self._serve_the_rest()
        except BaseException:
            self._abort_all(Outcome.ABORTED)
            raise
        finally:
            self._close()

    def _turn(self, timeout: float | None) -> None:
        """Whatever happens within so many seconds."""
        self._slot.beat()
        for fd, _events in self._epoll.poll(self._poll_timeout(timeout)):
            if fd == self._control.fileno():
                self._on_order()
            elif fd == self.wakeup.fileno():
                self.wakeup.clear()
            elif not self._acceptor.on_readable(fd):
                self._hangups.on_readable(fd)
        self._keep_time()

    # --- the clock

    def _poll_timeout(self, most: float | None) -> float | None:
        """Seconds until the clock has something to do, and not more than `most`; None if nothing is due."""
        now = time.monotonic()
        due = [at for at in (self._acceptor.due, self._admission.due) if at is not None]
        if most is not None:
            due.append(now + most)
        if len(self._registry):
            due.append(self._sample_at)
            if self._sweep_interval:
                due.append(self._sweep_at)
        if self._undecided:
            due.append(now + HANGUP_INTERVAL)
        if self._beat_interval:
            due.append(now + self._beat_interval)
        return max(0.0, min(due) - now) if due else None

    def _keep_time(self) -> None:
        now = time.monotonic()
        self._undecided = self._hangups.settle()
        self._acceptor.keep_time(now)
        if self._sweep_interval and now >= self._sweep_at:
            self._sweep_at = now + self._sweep_interval
            self._abort_overdue(now)
        if now >= self._sample_at:
            self._sample(now)
        self._admission.trim(now)

    def _sample(self, now: float) -> None:
        """Let the others see what has moved, without taking more than a small part of the time for it."""
        self._registry.sample(now - self._sampled_at)
        self._slot.log_dropped(self._log_dropped())
        self._sampled_at = now
        self._sample_at = now + max(SAMPLE_INTERVAL, SAMPLE_SHARE * (time.monotonic() - now))

    def _abort_overdue(self, now: float) -> None:
        for connection in self.live:
            outcome = snapshot.overdue(connection, now)
            if outcome:
                connection.abort(outcome)

    # --- orders and the end

    def _on_order(self) -> None:
        try:
            received = self._control.receive()
        except ValueError as error:
            log.error("an order was lost", extra={"why": str(error)})  # there was no room for its descriptor
            return
        if received is None:
            log.critical("the supervisor is gone")
            self._at_once = True
            return
        message, descriptors = received
        match messages.order_of(message):
            case messages.LogLive():
                self._log_live()
            case messages.ListSessions(query):
                self._send_sessions(query, *descriptors)
            case messages.Abort(number, account):
                self._abort(number, account, *descriptors)
            case messages.Leave() as order:
                self.leave(order)
            case messages.Stop():
                self._at_once = True

    def _send_sessions(self, given: Mapping[str, str] | None, to: int) -> None:
        """To the socket that came with the order."""
        query = None if given is None else session_query.parse(given)
        sessions.send(self._registry, query, socket.socket(fileno=to))

    def _abort(self, number: str, account: int, to: int) -> None:
        """The connection with that id, and answer in the same way."""
        with socket.socket(fileno=to) as answer, contextlib.suppress(OSError):
            found = [one for one in self.live if one.id == number]
            aborted = any(one.abort(Outcome.ABORTED) for one in found)
            if aborted:
                log.warning("aborted by an operator", extra={"id": number, "account": account})
            answer.send(json.dumps({"aborted": aborted}).encode() + b"\n")

    def leave(self, order: Leave) -> None:
        """Take no more clients, finish what there is, and end; a later order replaces an earlier one."""
        self._leave = order
        self._ends.all_awaited = True

    def _log_live(self) -> None:
        for connection in self.live:
            log.info("connection live", extra=snapshot.summary(connection))

    def _serve_latecomers(self) -> None:
        """Clients whose handshake was under way: without a listener its last packet would be answered by a reset."""
        if self._leave is None or self._at_once:
            return
        self._acceptor.leave(self._leave.listeners)
        self._control.send(messages.Left().to_message())
        deadline = time.monotonic() + self._leave.grace
        while not self._at_once and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        if not self._at_once:
            self._acceptor.take_backlog()

    def _serve_the_rest(self) -> None:
        """Until the last connection has ended, or the time for that; the order may come again with another one."""
        self._acceptor.close()
        order, began = self._leave, time.monotonic()
        while len(self._registry) and self._leave is not None and not self._at_once:
            if order is not self._leave:
                order, began = self._leave, time.monotonic()
            left = None if order.timeout is None else began + order.timeout - time.monotonic()
            if left is not None and left <= 0:
                break
            self._turn(left)
        self._abort_all(Outcome.ABORTED if self._at_once else Outcome.DRAINED)

    def _abort_all(self, outcome: Outcome) -> None:
        """Reset what is left. A connection whose threads are stuck is reset by the kernel when we exit."""
        deadline = time.monotonic() + ABORT_GRACE
        self._epoll.unregister(self._control.fileno())  # nothing that it may say matters any more
        while (live := self.live) and time.monotonic() < deadline:
            for connection in live:
                connection.abort(outcome)
            self._slot.beat()
            self._epoll.poll(0.1)
            self.wakeup.clear()
        for connection in self.live:
            connection.abandon()

    def _close(self) -> None:
        self._acceptor.close()
        self._threads.close()
        self._epoll.close()


def _sweep_interval(settings: Settings) -> float:
    """Seconds between two sweeps for overdue connections: a twentieth of the shortest timeout; 0: there is none."""
    timeouts = [timeout for timeout in (settings.idle_timeout, settings.half_close_timeout) if timeout]
    return min(1.0, max(0.05, min(timeouts) / 20)) if timeouts else 0.0


def _paths(settings: Settings) -> tuple[PathTuning, PathTuning]:
    """To the clients, and to the servers. Tried out here, with the rights that this process has."""
    paths = (
        PathTuning(settings.client_congestion, settings.client_pacing, settings.socket_buffer),
        PathTuning(settings.upstream_congestion, settings.upstream_pacing, settings.socket_buffer),
    )
    for side, path in zip(("client", "upstream"), paths):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            try:
                sockets.tune(probe, path)
            except OSError as error:
                name, why = path.congestion, error.strerror
                if error.errno == errno.ENOENT:
                    why = f"this kernel does not have it; `modprobe tcp_{name}` may help"
                elif error.errno == errno.EPERM:
                    why = "not for everybody here; add it to the sysctl net.ipv4.tcp_allowed_congestion_control"
                raise ConfigError(f"{side}-congestion: {name}: {why}") from error
    return paths
