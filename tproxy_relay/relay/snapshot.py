"""What can be said of a connection while it is live, for those who look at it from outside.

All of it may be a moment late: nothing here waits for the connection's own threads.
"""

import math
import time
from collections.abc import Iterator
from typing import Protocol

from tproxy_relay.net import sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay.pumps import Leg, Relay
from tproxy_relay.relay.registry import ConnectionTraffic
from tproxy_relay.settings import Settings


class Live(Protocol):
    """A connection, as far as it is looked at."""

    id: str
    client: Endpoint
    listener: Listener
    orig_dst: Endpoint | None
    """Where the client was going; None while, or if, nobody knows."""
    destination: Endpoint | None
    """Where the relay connects to; None while that is not decided."""
    upstream_local: Endpoint | None
    """The address that the server sees; None until it is there."""
    client_leg: Leg
    upstream_leg: Leg | None
    relay: Relay | None
    """None until the server is connected."""
    ordered_outcome: Outcome | None
    """That it has been told to end with."""
    traffic: ConnectionTraffic
    born_at: float
    """When it was accepted (time.monotonic())."""

    @property
    def settings(self) -> Settings:
        """The settings of the relay that has it."""

    @property
    def moved(self) -> tuple[int, int]:
        """Bytes passed to the server, and to the client, so far."""


def where(one: Live) -> dict[str, object]:
    """Who it is, and between whom: the first fields of every line about it."""
    fields: dict[str, object] = {"id": one.id, "listener": one.listener.name, "client": str(one.client)}
    for name, value in (("orig_dst", one.orig_dst), ("upstream_local", one.upstream_local)):
        if value is not None:
            fields[name] = str(value)
    return fields


def summary(one: Live) -> dict[str, object]:
    """The fields of a log line that shows it live: `where`, its state, bytes each way, and seconds since it was
    accepted and since it rests."""
    now, (up, down) = time.monotonic(), one.moved
    fields = where(one)
    fields.update(
        state=state(one),
        bytes_up=up,
        bytes_down=down,
        seconds=round(now - one.born_at, 3),
        idle_seconds=round(now - rests_since(one), 3),
    )
    return fields


def session(one: Live) -> dict[str, object]:
    """Everything that can be said of it now (docs/looking-in.rst has the fields). OSError if it has just ended."""
    fields, settings = summary(one), one.settings
    port = one.listener.endpoint.port
    if port in (settings.inbound_port, settings.outbound_port):
        fields["direction"] = "inbound" if port == settings.inbound_port else "outbound"
    if one.destination is not None and one.destination != one.orig_dst:
        fields["destination"] = str(one.destination)
    fields["rate_up"], fields["rate_down"] = round(one.traffic.up_rate), round(one.traffic.down_rate)
    outcome, seconds = ending(one, time.monotonic())
    if outcome is not None:
        fields["ending"] = outcome
    if seconds is not None:
        fields["ending_in_seconds"] = round(max(0.0, seconds), 3)
    for leg in filter(None, (one.client_leg, one.upstream_leg)):
        info = sockets.tcp_info(leg.sock)
        fields[f"{leg.name}_rtt_ms"] = info.rtt_us / 1000
        fields[f"{leg.name}_retransmits"] = info.retransmits
    return fields


def state(one: Live) -> str:
    """One of session_query.STATES: `connecting` until the server is connected, `half-closed` after the first FIN, and
    `open` between."""
    relay = one.relay
    return "connecting" if relay is None else "half-closed" if relay.half_closed else "open"


def rests_since(one: Live) -> float:
    """When a byte last moved, or when it was accepted if it is not open yet (time.monotonic())."""
    relay = one.relay
    return one.born_at if relay is None else relay.moved_at


def moved_at(one: Live) -> float:
    """When a byte last moved, either way (time.monotonic()); infinity while it is not open yet: that takes no longer
    than connect-timeout."""
    relay = one.relay
    return math.inf if relay is None else relay.moved_at


def overdue(one: Live, now: float) -> Outcome | None:
    """The timeout that has run out for it at `now` (time.monotonic()), if one has."""
    for outcome, seconds in _timeouts(one, now):
        if seconds <= 0:
            return outcome
    return None


def ending(one: Live, now: float) -> tuple[str | None, float | None]:
    """The outcome that it has already, though it is still there, and None; or the one that it will have if nothing
    moves, and in how many seconds. (None, None): none, as far as it is known."""
    relay, ordered = one.relay, one.ordered_outcome
    if ordered is not None:
        return ordered.value, None
    if relay is not None and relay.failed is not None:
        return (Outcome.CLIENT_RESET if relay.failed is relay.client else Outcome.UPSTREAM_RESET).value, None
    first = min(_timeouts(one, now), key=lambda timeout: timeout[1], default=None)
    return (None, None) if first is None else (first[0].value, first[1])


def _timeouts(one: Live, now: float) -> Iterator[tuple[Outcome, float]]:
    """Those that run, and the seconds that are left of each."""
    settings, relay = one.settings, one.relay
    if relay is not None:
        rest = now - relay.moved_at
        if settings.idle_timeout:
            yield Outcome.IDLE, settings.idle_timeout - rest
        if settings.half_close_timeout and relay.half_closed:
            yield Outcome.HALF_CLOSE_TIMEOUT, settings.half_close_timeout - rest
