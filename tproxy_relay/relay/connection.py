"""The life of one intercepted connection, from accept to its record.

`run` is the recipe: where was it going, may it go there, connect, relay, and in the end one record. Each step
is a call into a leaf that knows nothing of its caller. Thread A runs `run` and pumps from client to upstream;
thread B pumps the other way; whoever leaves last closes both sockets.
"""

import errno
import logging
import socket
import threading
import time
from dataclasses import dataclass

from tproxy_relay.logs import formatters
from tproxy_relay.net import endpoint, ingress, orig_dst, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import connect, loops, policy, snapshot
from tproxy_relay.relay.access_record import ConnectionRecord
from tproxy_relay.relay.connect import SocketTuning
from tproxy_relay.relay.loops import Flow
from tproxy_relay.relay.policy import Policy, RefusedError
from tproxy_relay.relay.pumps import HangupWatch, Leg, Relay
from tproxy_relay.relay.registry import NOTHING_CARRIED, Registry
from tproxy_relay.relay.thread_pool import ThreadPool
from tproxy_relay.settings import Settings
from tproxy_relay.system.cpu import CpuPlacement

THREADS = 2
"""That a connection needs: one for each pump."""

log = logging.getLogger(__name__)
access_log = logging.getLogger("tproxy_relay.access")


@dataclass(frozen=True)
class WorkerContext:
    """What all connections of a worker share."""

    settings: Settings
    tuning: SocketTuning
    policy: Policy
    registry: "Registry[Connection]"
    threads: ThreadPool
    watch: HangupWatch
    cpu: CpuPlacement


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
        "listener",
        "born_at",
        "client_leg",
        "upstream_leg",
        "upstream_local",
        "_source",
        "_connect_seconds",
        "relay",
        "_lock",
        "ordered_outcome",
        "_ended",
    )

    def __init__(
        self, number: str, sock: socket.socket, client: Endpoint, listener: Listener, context: WorkerContext
    ) -> None:
        self.id = number
        self.client = client
        self.orig_dst: Endpoint | None = None
        self.destination: Endpoint | None = None
        self.flows: list[Flow] = []
        self.traffic = NOTHING_CARRIED
        self._context = context
        self.listener = listener
        self.born_at = time.monotonic()
        self.client_leg = Leg("client", sock)
        self.upstream_leg: Leg | None = None
        self.upstream_local: Endpoint | None = None
        self._source: str | None = None
        self._connect_seconds: float | None = None
        self.relay: Relay | None = None
        self._lock = threading.Lock()
        self.ordered_outcome: Outcome | None = None
        self._ended = False

    def run(self) -> None:
        """Serve it from here to its record, and pump from client to server: the life of thread A."""
        try:
            if self._context.settings.interface:
                ingress.open_to_all(self.client_leg.sock)  # the interface may be made again
            sockets.tune(self.client_leg.sock, self._context.tuning.to_client)
            self._resolve()
            self.relay = Relay(self.client_leg, self._connect(), self._context.watch, self._context.cpu)
            if access_log.isEnabledFor(logging.DEBUG):
                formatters.note(access_log, logging.DEBUG, "connection open", snapshot.where(self))
        except RefusedError as refusal:
            self._end(refusal.outcome, str(refusal))
        except Exception as error:
            outcome, text = self._blame(error)
            self._end(outcome, text)
        else:
            self._context.threads.run(self._pump_down)
            self._pump(self.relay, self.relay.client, self.relay.upstream)

    def _blame(self, error: Exception) -> tuple[Outcome, str]:
        """A bug, unless the descriptors ran out for one of the sockets that policy.py probes with."""
        if isinstance(error, OSError) and error.errno in connect.CAPACITY:
            return Outcome.OVER_LIMIT, connect.text_of(error)
        log.error("a connection met a bug", extra={"id": self.id}, exc_info=error)
        return Outcome.INTERNAL_ERROR, repr(error)

    def _resolve(self) -> None:
        try:
            self.orig_dst = orig_dst.original_destination(self.client_leg.sock, self._context.settings.mode)
        except OSError as error:  # reset before we looked
            raise RefusedError(Outcome.CLIENT_RESET, connect.text_of(error)) from error
        self.destination = self._context.policy.choose(self.orig_dst, self.listener.endpoint.port)
        if self.orig_dst is None:
            return  # a stranger at the listener's own address: nothing that we opened
        flow = Flow(self.client, self.orig_dst)
        self.flows.append(flow)
        if self._context.registry.loops.note_accepted(self.id, flow):
            raise loops.refusal(flow)

    def _connect(self) -> Leg:
        """The upstream leg, connected; RefusedError if there is none to be had."""
        assert self.destination is not None
        began, refusal = time.monotonic(), RefusedError(Outcome.INTERNAL_ERROR, "no source to connect from")
        for source in policy.sources(self._context.settings, self.client, self.destination):
            try:
                leg = self._connect_from(source, self.destination)
            except OSError as error:
                refusal = connect.refusal(error, self.ordered_outcome)
                if error.errno not in connect.NO_PORT:
                    break
            else:
                self._connect_seconds = time.monotonic() - began
                self._context.registry.connected(self._connect_seconds)
                self._note_upstream(leg, source)
                return leg
        raise refusal

    def _connect_from(self, source: str, destination: Endpoint) -> Leg:
        leg = Leg("upstream", connect.open_socket(destination.family, self._context.tuning))
        try:
            self._source = source
            if source != policy.RELAY:
                connect.imitate(self.client, source, leg.sock)
            with self._lock:
                self.upstream_leg = leg
            if self.ordered_outcome:
                raise ConnectionAbortedError(errno.ECONNABORTED, "told to end")
            sockets.connect(leg.sock, destination, self._context.settings.connect_timeout)
        except OSError:
            with self._lock:
                self.upstream_leg = None
            leg.sock.close()
            raise
        return leg

    def _note_upstream(self, leg: Leg, source: str) -> None:
        assert self.destination is not None
        self.upstream_local = endpoint.from_sockaddr(leg.sock.getsockname())
        if source == policy.FULL:
            return  # the same four numbers as the client's own connection, and as its next one from that port
        flow = Flow(self.upstream_local, self.destination)
        self.flows.append(flow)
        if self._context.registry.loops.note_opened(self.id, flow):
            raise loops.refusal(flow)

    def _pump_down(self) -> None:
        """Thread B, from server to client."""
        assert self.relay is not None
        self._pump(self.relay, self.relay.upstream, self.relay.client)

    def _pump(self, relay: Relay, src: Leg, dst: Leg) -> None:
        with self._lock:
            ordered = self.ordered_outcome
        if ordered:
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
            return outcome, connect.text_of(relay.failed.error) if relay.failed.error else None
        if relay.clean:
            return Outcome.COMPLETED, None
        return self.ordered_outcome or Outcome.ABORTED, None

    def refuse(self, why: str, threads: int = 0) -> None:
        """Reset it for want of room, without having served it, and give the threads back that were set aside for it. In
        place of `run`."""
        self._end(Outcome.OVER_LIMIT, why, threads)

    def abort(self, outcome: Outcome) -> bool:
        """End it from outside, in whatever phase it is; both peers see a reset. The first reason counts: False if there
        was one already."""
        with self._lock:
            first = self.ordered_outcome is None and not self._ended
            self.ordered_outcome = self.ordered_outcome or outcome
            relay, upstream = self.relay, self.upstream_leg
            if relay is None and upstream is not None and not self._ended:
                sockets.wake_reader(upstream.sock)
        if relay is not None:
            relay.abort()
        return first

    @property
    def settings(self) -> Settings:
        """The settings of the relay that has it."""
        return self._context.settings

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed to the server, and to the client, so far."""
        upstream = self.upstream_leg
        return (upstream.sent if upstream else 0), self.client_leg.sent

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
            self._context.threads.release(threads)  # not before: whoever starts threads meanwhile has this one wait
            self._context.registry.notify_end()

    def abandon(self) -> None:
        """At the end of the process: record it though its threads are stuck. The kernel resets both peers
        when the process is gone."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        outcome = self.ordered_outcome or Outcome.ABORTED
        self._write(self._record(outcome, "its threads did not end in time"))
        self._context.registry.remove(self, outcome.value)

    def _record(self, outcome: Outcome, error: str | None) -> ConnectionRecord:
        upstream = self.upstream_leg
        return ConnectionRecord(
            id=self.id,
            listener=self.listener.name,
            client=self.client,
            orig_dst=self.orig_dst,
            destination=self.destination,
            upstream_local=self.upstream_local,
            source=self._source,
            outcome=outcome,
            error=error,
            bytes_up=upstream.sent if upstream else 0,
            bytes_down=self.client_leg.sent,
            seconds=time.monotonic() - self.born_at,
            connect_seconds=self._connect_seconds,
            client_tcp=sockets.tcp_info(self.client_leg.sock),
            upstream_tcp=sockets.tcp_info(upstream.sock) if upstream else None,
        )

    def _close(self, *, clean: bool) -> None:
        for leg in (self.client_leg, self.upstream_leg):
            if leg is not None:
                if clean:
                    sockets.finish_with_fin(leg.sock)
                leg.sock.close()

    def _write(self, record: ConnectionRecord) -> None:
        fields = record.as_fields()
        if record.of_self_probe:  # what it has found is told by status
            formatters.note(access_log, logging.DEBUG, "connection closed", fields)
            return
        if not record.outcome.ordinary:
            self._context.registry.refused.append({"time": time.time(), **fields})
        level = logging.INFO if record.outcome.ordinary else logging.WARNING
        formatters.note(access_log, level, "connection closed", fields)
