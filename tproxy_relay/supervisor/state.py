"""What the managers of one relay share: where its life is, the generation in force, and the workers there are.

All of it belongs to the one thread of the supervisor.
"""

from collections.abc import MutableMapping
from enum import Enum

from tproxy_relay.guard.guard_client import Interception
from tproxy_relay.supervisor.generation import Generation
from tproxy_relay.supervisor.workers import Workers


class Phase(Enum):
    """Of the life of a relay. The values are the words of /status."""

    STARTING = "starting"
    """Until the first generation is in force."""
    RUNNING = "running"
    ROLLING_OUT = "reloading"
    """Until a new generation is in force, and the one before takes no more clients."""
    DRAINING = "draining"
    """The live connections are finished or reset, and then it ends."""
    HANDED_OVER = "handed over"
    """The same, for as long as they like, and another relay has the listeners and the ruleset."""


class RelayState:
    """Read by the supervisor and its managers. The phase is changed by whoever begins or ends it: rollout, shutdown,
    and a signal before there is anything to shut down."""

    workers: Workers
    """Set before the first of them is started."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self.environ = environ
        """With the service manager's variables."""
        self.phase = Phase.STARTING
        self.inherited = False
        """The listeners were passed on to this relay, by a socket unit."""
        self.current: Generation | None = None
        """The generation in force; None at the start."""
        self.interception: Interception | None = None
        """The ruleset; None if nothing is intercepted."""
        self.missing_interface: str | None = None
        """The interface that the settings name, while there is none of that name: nobody can come in."""
        self.reloads = self.reloads_refused = 0

    @property
    def generation(self) -> Generation:
        """The generation in force, and with it the settings. Raises RuntimeError before there is one."""
        if self.current is None:
            raise RuntimeError("no generation is in force yet")
        return self.current

    @property
    def ending(self) -> bool:
        """True once it takes no new clients."""
        return self.phase in (Phase.DRAINING, Phase.HANDED_OVER)

    @property
    def busy(self) -> str | None:
        """Why neither a reload nor another relay can begin now; None if both can."""
        if self.ending:
            return "it is stopping"
        return None if self.phase is Phase.RUNNING else "it is reloading"
