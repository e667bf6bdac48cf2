"""A registry without a worker, and what it takes for connections."""

import time
from dataclasses import dataclass, field

from tproxy_relay.ipc.slot import Slot
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.relay.end_notifier import EndNotifier
from tproxy_relay.relay.loops import Flow
from tproxy_relay.relay.registry import NOTHING_CARRIED, ConnectionTraffic, Registry
from tproxy_relay.system.wakeup import Wakeup


@dataclass
class Someone:
    """A connection, as far as the registry cares."""

    id: str
    client: Endpoint
    flows: list[Flow] = field(default_factory=list)
    moved: tuple[int, int] = (0, 0)
    traffic: ConnectionTraffic = NOTHING_CARRIED
    born_at: float = field(default_factory=time.monotonic)


def someone(number: int, host: str = "192.0.2.1") -> Someone:
    """One with its own port."""
    return Someone(f"c{number}", Endpoint(host, 1000 + number))


def registry_of(slot: Slot, *, share_sources: bool = False) -> Registry[Someone]:
    """A registry of whose ends nobody wants to know: to wake somebody would be an error."""
    wakeup = Wakeup()
    wakeup.close()
    return Registry(slot, EndNotifier(slot, wakeup), share_sources=share_sources)


Two = tuple[Registry[Someone], Registry[Someone]]

FLOW = Flow(Endpoint("192.0.2.1", 1), Endpoint("192.0.2.2", 2))
