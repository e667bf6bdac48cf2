"""The life of one intercepted connection, from accept to its record.

`run` is the recipe: where was it going, may it go there, connect, relay, and in the end one record. Each step
is a call into a leaf that knows nothing of its caller. Thread A runs `run` and pumps from client to upstream;
thread B pumps the other way; whoever leaves last closes both sockets.
"""

import errno
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tproxy_relay.logs import writer
from tproxy_relay.net import endpoint, orig_dst, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.net.sockets import PathTuning, Tuning
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import policy
from tproxy_relay.relay.access_record import ConnectionRecord
from tproxy_relay.relay.policy import Policy, RefusedError
from tproxy_relay.relay.pumps import HangupWatch, Leg, Relay
from tproxy_relay.relay.registry import NO_TRAFFIC, Flow, Registry
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.settings import Settings
from tproxy_relay.system.cpu import CpuPlacement

THREADS = 2
"""That a connection needs: one for each pump."""

_CAPACITY = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NO_PORT = frozenset({errno.EADDRNOTAVAIL, errno.EADDRINUSE})
_UNREACHABLE = frozenset(
    {
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.EAFNOSUPPORT,
        errno.ENOPROTOOPT,
        errno.EPROTO,
        errno.EINVAL,
        errno.EACCES,  # a prohibit route, or a broadcast address
        errno.EPERM,  # a local firewall rule
    }
)

log = logging.getLogger(__name__)
access_log = logging.getLogger("tproxy_relay.access")


@dataclass(frozen=True)
class Context:
    """What all connections of a worker share."""

    settings: Settings
    tuning: Tuning
    to_client: PathTuning
    to_server: PathTuning
    policy: Policy
    registry: "Registry[Connection]"
    threads: ThreadPool
    watch: HangupWatch
    processors: CpuPlacement
    refused: "deque[dict[str, object]]"
    """The last records of connections that did not end as TCP connections do."""
    ended: Callable[[], None]
    """Called after a connection has given everything back."""


class Connection:
    """One accepted connection. Everybody but its own two threads may only look at it, or `abort` it."""

    __slots__ = (
        "id",
        "client",
        "orig_dst",
        "destination",
        "flows",
        "traffic",
        "_context",
        "_listener",
        "born_at",
        "_client",
        "_upstream",
        "_upstream_local",
        "_source",
        "_connect_seconds",
        "_relay",
        "_lock",
        "_told_to_end",
        "_ended",
    )

    def __init__(
        self, number: str, sock: socket.socket, client: Endpoint, listener: Listener, context: Context
    ) -> None:
        self.id = number
        self.client = client
        self.orig_dst: Endpoint | None = None
        self.destination: Endpoint | None = None
        self.flows: list[Flow] = []
        self.traffic = NO_TRAFFIC
        self._context = context
        self._listener = listener
        self.born_at = time.monotonic()
        self._client = Leg("client", sock)
        self._upstream: Leg | None = None
        self._upstream_local: Endpoint | None = None
        self._source: str | None = None
        self._connect_seconds: float | None = None
        self._relay: Relay | None = None
        self._lock = threading.Lock()
        self._told_to_end: Outcome | None = None
        self._ended = False

    def run(self) -> None:
        """Thread A: all of it."""
        try:
            sockets.tune(self._client.sock, self._context.to_client)
            self._resolve()
            self._relay = Relay(self._client, self._connect(), self._context.watch, self._context.processors)
            if access_log.isEnabledFor(logging.DEBUG):
                writer.note(access_log, logging.DEBUG, "connection open", self._where())
        except RefusedError as refusal:
            self._end(refusal.outcome, str(refusal))
        except Exception as error:
            outcome, text = self._blame(error)
            self._end(outcome, text)
        else:
            self._context.threads.run(self._pump_down)
            self._pump(self._relay, self._relay.client, self._relay.upstream)

    def _blame(self, error: Exception) -> tuple[Outcome, str]:
        """A bug, unless the descriptors ran out for one of the sockets that policy.py probes with."""
        if isinstance(error, OSError) and error.errno in _CAPACITY:
            return Outcome.OVER_LIMIT, _text(error)
        log.error("a connection met a bug", extra={"id": self.id}, exc_info=error)
        return Outcome.INTERNAL_ERROR, repr(error)

    def _resolve(self) -> None:
        try:
            self.orig_dst = orig_dst.original_destination(self._client.sock, self._context.settings.mode)
        except OSError as error:  # reset before we looked
            raise RefusedError(Outcome.CLIENT_RESET, _text(error)) from error
        self.destination = self._context.policy.choose(self.orig_dst, self._listener.endpoint.port)
        if self.orig_dst is None:
            return  # a stranger at the listener's own address: nothing that we opened
        flow = Flow(self.client, self.orig_dst)
        self.flows.append(flow)
        if self._context.registry.is_loop_accepted(self, flow):
            raise self._loop(flow)

    @staticmethod
    def _loop(flow: Flow) -> RefusedError:
        return RefusedError(
            Outcome.LOOP,
            f"the relay's own connection {flow.source} -> {flow.destination} was intercepted: the ruleset "
            "lacks the rule that lets packets with the relay's mark, or of its account, pass",
        )

    def _connect(self) -> Leg:
        """The upstream leg, connected; RefusedError if there is none to be had."""
        assert self.destination is not None
        began, refusal = time.monotonic(), RefusedError(Outcome.INTERNAL_ERROR, "no source to connect from")
        for source in policy.sources(self._context.settings, self.client, self.destination):
            try:
                leg = self._connect_from(source, self.destination)
            except OSError as error:
                refusal = self._refusal(error)
                if error.errno not in _NO_PORT:
                    break
            else:
                self._connect_seconds = time.monotonic() - began
                self._context.registry.connected(self._connect_seconds)
                self._note_upstream(leg, source)
                return leg
        raise refusal

    def _connect_from(self, source: str, destination: Endpoint) -> Leg:
        leg = Leg("upstream", sockets.upstream_socket(destination.family, self._context.tuning))
        try:
            sockets.tune(leg.sock, self._context.to_server)
            self._source = source
            if source != policy.RELAY:
                self._imitate_client(leg.sock, source)
            with self._lock:
                self._upstream = leg
            if self._told_to_end:
                raise ConnectionAbortedError(errno.ECONNABORTED, "told to end")
            sockets.connect(leg.sock, destination, self._context.settings.connect_timeout)
        except OSError:
            with self._lock:
                self._upstream = None
            leg.sock.close()
            raise
        return leg

    def _imitate_client(self, sock: socket.socket, source: str) -> None:
        try:
            sockets.bind_foreign(sock, self.client if source == policy.FULL else self.client.with_port(0))
        except OSError as error:
            if error.errno != errno.EACCES:
                raise
            # a client with a port below 1024, and we have no CAP_NET_BIND_SERVICE: any other port will do
            raise OSError(errno.EADDRNOTAVAIL, error.strerror) from error

    def _note_upstream(self, leg: Leg, source: str) -> None:
        assert self.destination is not None
        self._upstream_local = endpoint.from_sockaddr(leg.sock.getsockname())
        if source == policy.FULL:
            return  # the same four numbers as the client's own connection, and as its next one from that port
        flow = Flow(self._upstream_local, self.destination)
        self.flows.append(flow)
        if self._context.registry.is_loop_opened(self, flow):
            raise self._loop(flow)

    def _refusal(self, error: OSError) -> RefusedError:
        """The outcome of a connect that failed."""
        if self._told_to_end:
            return RefusedError(self._told_to_end, "while connecting")
        if isinstance(error, TimeoutError):
            return RefusedError(Outcome.CONNECT_TIMEOUT, _text(error))
        for outcome, numbers in (
            (Outcome.CONNECT_REFUSED, (errno.ECONNREFUSED, errno.ECONNRESET)),
            (Outcome.NO_LOCAL_PORT, _NO_PORT),
            (Outcome.CONNECT_UNREACHABLE, _UNREACHABLE),
            (Outcome.OVER_LIMIT, _CAPACITY),
        ):
            if error.errno in numbers:
                return RefusedError(outcome, _text(error))
        return RefusedError(Outcome.INTERNAL_ERROR, _text(error))

    def _pump_down(self) -> None:
        """Thread B."""
        assert self._relay is not None
        self._pump(self._relay, self._relay.upstream, self._relay.client)

    def _pump(self, relay: Relay, src: Leg, dst: Leg) -> None:
        with self._lock:
            told = self._told_to_end
        if told:
            relay.abort()  # it came between connecting and relaying
        if relay.carry(src, dst):
            if relay.failed:
                relay.flush()
            outcome, error = self._how_it_ended(relay)
            self._end(outcome, error)  # by `*` the call would be nested in C, and touch one more page of the stack

    def _how_it_ended(self, relay: Relay) -> tuple[Outcome, str | None]:
        if relay.bug:
            log.error("a relay met a bug", extra={"id": self.id}, exc_info=relay.bug)
            return Outcome.INTERNAL_ERROR, repr(relay.bug)
        if relay.failed:
            outcome = Outcome.CLIENT_RESET if relay.failed is relay.client else Outcome.UPSTREAM_RESET
            return outcome, _text(relay.failed.error) if relay.failed.error else None
        if relay.clean:
            return Outcome.COMPLETED, None
        return self._told_to_end or Outcome.ABORTED, None

    def refuse(self, why: str) -> None:
        """Reset it for want of room, without having served it. Main thread, in place of `run`; no threads are given
        back."""
        self._end(Outcome.OVER_LIMIT, why, threads=0)

    def abort(self, outcome: Outcome) -> bool:
        """End it from outside, in whatever phase it is; both peers see a reset. The first reason counts: False if there
        was one already."""
        with self._lock:
            first = self._told_to_end is None and not self._ended
            self._told_to_end = self._told_to_end or outcome
            relay, upstream = self._relay, self._upstream
            if relay is None and upstream is not None and not self._ended:
                sockets.wake_reader(upstream.sock)
        if relay is not None:
            relay.abort()
        return first

    @property
    def moved_at(self) -> float:
        """When a byte last moved, either way (time.monotonic()); infinity while it is not open yet: that takes no
        longer than connect-timeout."""
        relay = self._relay
        return math.inf if relay is None else relay.moved_at

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed to the server, and to the client, so far."""
        upstream = self._upstream
        return (upstream.sent if upstream else 0), self._client.sent

    def overdue(self, now: float) -> Outcome | None:
        """The timeout that has run out for it at `now` (time.monotonic()), if one has."""
        for outcome, seconds in self._timeouts(now):
            if seconds <= 0:
                return outcome
        return None

    def _timeouts(self, now: float) -> Iterator[tuple[Outcome, float]]:
        """Those that run, and the seconds that are left of each."""
        settings, relay = self._context.settings, self._relay
        if relay is not None:
            rest = now - relay.moved_at
            if settings.idle_timeout:
                yield Outcome.IDLE, settings.idle_timeout - rest
            if settings.half_close_timeout and relay.half_closed:
                yield Outcome.HALF_CLOSE_TIMEOUT, settings.half_close_timeout - rest

    def ending(self, now: float) -> tuple[str | None, float | None]:
        """The outcome that it has already, though it is still there, and None; or the one that it will have if nothing
        moves, and in how many seconds. (None, None): none, as far as it is known."""
        relay, told = self._relay, self._told_to_end
        if told is not None:
            return told.value, None
        if relay is not None and relay.failed is not None:
            return (Outcome.CLIENT_RESET if relay.failed is relay.client else Outcome.UPSTREAM_RESET).value, None
        first = min(self._timeouts(now), key=lambda timeout: timeout[1], default=None)
        return (None, None) if first is None else (first[0].value, first[1])

    @property
    def state(self) -> str:
        """connecting, open or half-closed."""
        relay = self._relay
        return "connecting" if relay is None else "half-closed" if relay.half_closed else "open"

    @property
    def rests_since(self) -> float:
        """When a byte last moved, or when it was accepted if it is not open yet (time.monotonic())."""
        relay = self._relay
        return self.born_at if relay is None else relay.moved_at

    def snapshot(self) -> dict[str, object]:
        """The fields of a line that shows it live."""
        now, (up, down) = time.monotonic(), self.moved
        fields = self._where()
        fields.update(
            state=self.state,
            bytes_up=up,
            bytes_down=down,
            seconds=round(now - self.born_at, 3),
            idle_seconds=round(now - self.rests_since, 3),
        )
        return fields

    def session(self) -> dict[str, object]:
        """Everything that can be said of it now (docs/looking-in.rst has the fields). OSError if it has just ended."""
        fields, settings = self.snapshot(), self._context.settings
        port = self._listener.endpoint.port
        if port in (settings.inbound_port, settings.outbound_port):
            fields["direction"] = "inbound" if port == settings.inbound_port else "outbound"
        if self.destination is not None and self.destination != self.orig_dst:
            fields["destination"] = str(self.destination)
        fields["rate_up"], fields["rate_down"] = round(self.traffic.up_rate), round(self.traffic.down_rate)
        outcome, seconds = self.ending(time.monotonic())
        if outcome is not None:
            fields["ending"] = outcome
        if seconds is not None:
            fields["ending_in_seconds"] = round(max(0.0, seconds), 3)
        for leg in filter(None, (self._client, self._upstream)):
            info = sockets.tcp_info(leg.sock)
            fields[f"{leg.name}_rtt_ms"] = info.rtt_us / 1000
            fields[f"{leg.name}_retransmits"] = info.retransmits
        return fields

    def _where(self) -> dict[str, object]:
        fields: dict[str, object] = {"id": self.id, "listener": self._listener.name, "client": str(self.client)}
        for name, value in (("orig_dst", self.orig_dst), ("upstream_local", self._upstream_local)):
            if value is not None:
                fields[name] = str(value)
        return fields

    def _end(self, outcome: Outcome, error: str | None, threads: int = THREADS) -> None:
        """Close, record, count out, give so many threads back. Once; the sockets are nobody else's any more."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        try:
            record = self._record(outcome, error)
            self._close(clean=outcome is Outcome.COMPLETED)
            self._write(record)
        finally:
            self._close(clean=False)  # nothing is left to close unless the lines above failed
            self._context.registry.remove(self, outcome.value)
            self._context.threads.release(threads)
            self._context.ended()

    def abandon(self) -> None:
        """At the end of the process: record it though its threads are stuck. The kernel resets both peers
        when the process is gone."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        outcome = self._told_to_end or Outcome.ABORTED
        self._write(self._record(outcome, "its threads did not end in time"))
        self._context.registry.remove(self, outcome.value)

    def _record(self, outcome: Outcome, error: str | None) -> ConnectionRecord:
        upstream = self._upstream
        return ConnectionRecord(
            id=self.id,
            listener=self._listener.name,
            client=self.client,
            orig_dst=self.orig_dst,
            destination=self.destination,
            upstream_local=self._upstream_local,
            source=self._source,
            outcome=outcome,
            error=error,
            bytes_up=upstream.sent if upstream else 0,
            bytes_down=self._client.sent,
            seconds=time.monotonic() - self.born_at,
            connect_seconds=self._connect_seconds,
            client_tcp=sockets.tcp_info(self._client.sock),
            upstream_tcp=sockets.tcp_info(upstream.sock) if upstream else None,
        )

    def _close(self, *, clean: bool) -> None:
        for leg in (self._client, self._upstream):
            if leg is not None:
                if clean:
                    sockets.finish_with_fin(leg.sock)
                leg.sock.close()

    def _write(self, record: ConnectionRecord) -> None:
        fields = record.as_fields()
        if not record.outcome.ordinary:
            self._context.refused.append({"time": time.time(), **fields})
        level = logging.INFO if record.outcome.ordinary else logging.WARNING
        writer.note(access_log, level, "connection closed", fields)


def _text(error: OSError) -> str:
    return error.strerror or str(error)
