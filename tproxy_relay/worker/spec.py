"""What a supervisor hands to a worker when it starts it, and how that travels as a message."""

from dataclasses import asdict, dataclass

from tproxy_relay.ipc.channel import Message
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.relay.policy import Policy
from tproxy_relay.settings import Settings
from tproxy_relay.system.limits import Limits


@dataclass(frozen=True)
class WorkerSpec:
    """All that a worker needs beside its descriptors."""

    settings: Settings
    tuning: Tuning
    """Of the sockets that it opens; its listeners are set already."""
    policy: Policy
    limits: Limits

    def to_message(self, slot: int, cpu: int | None) -> Message:
        """The message for the worker with this slot of the scoreboard, which stays on that processor (None: on any)."""
        policy = {"own_ports": sorted(self.policy.own_ports), "target": self.policy.target}
        return {
            "slot": slot,
            "cpu": cpu,
            "settings": self.settings.to_json(),
            "tuning": asdict(self.tuning),
            "policy": policy,
            "limits": self.limits,
        }


def of_message(message: Message) -> WorkerSpec:
    """The specification in the first message of a supervisor. Raises KeyError for one that lacks something,
    and TypeError for one with a setting that this version does not know."""
    settings = Settings.from_json(message["settings"])
    return WorkerSpec(
        settings,
        Tuning(**message["tuning"]),
        _policy(message["policy"], settings),
        Limits(*message["limits"]),
    )


def _policy(values: Message, settings: Settings) -> Policy:
    target = values["target"]
    own_ports = frozenset(values["own_ports"])
    return Policy.of_settings(settings, own_ports, None if target is None else Endpoint(*target))
