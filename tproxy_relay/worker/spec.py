"""What the supervisor tells a worker when it starts it, and how that travels as a message."""

from dataclasses import asdict, dataclass

from tproxy_relay.ipc.channel import Message
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.relay.policy import Destinations
from tproxy_relay.settings import Settings
from tproxy_relay.system.limits import Limits


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs beside its descriptors."""

    settings: Settings
    tuning: Tuning
    """Of the sockets that it opens; its listeners are set already."""
    destinations: Destinations
    limits: Limits

    def to_message(self, slot: int, cpu: int | None) -> Message:
        """For the worker that has this slot on the scoreboard, and stays on that processor (None: on any)."""
        destinations = {"own_ports": sorted(self.destinations.own_ports), "target": self.destinations.target}
        return {
            "slot": slot,
            "cpu": cpu,
            "settings": self.settings.to_json(),
            "tuning": asdict(self.tuning),
            "destinations": destinations,
            "limits": self.limits,
        }


def of_message(message: Message) -> WorkerSpec:
    """The other way."""
    settings = Settings.from_json(message["settings"])
    return WorkerSpec(
        settings,
        Tuning(**message["tuning"]),
        _destinations(message["destinations"], settings),
        Limits(*message["limits"]),
    )


def _destinations(values: Message, settings: Settings) -> Destinations:
    target = values["target"]
    own_ports = frozenset(values["own_ports"])
    return Destinations.of_settings(settings, own_ports, None if target is None else Endpoint(*target))
