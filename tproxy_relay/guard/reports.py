"""What a guard has told of the host beside its own rules, for whoever asks in the supervisor's main thread."""

import threading

from tproxy_relay.guard.messages import Counted, HostChanged


class Reports:
    """Filled by the thread that receives; safe to use from several."""

    def __init__(self, counted: Counted | None) -> None:
        """`counted`: what the rules have taken up to now; None for those that were another relay's."""
        self._lock = threading.Lock()
        self._changes = 0
        self._counted = counted

    def take(self, event: Counted | HostChanged) -> None:
        """An event of the guard."""
        with self._lock:
            if isinstance(event, Counted):
                self._counted = event
            else:
                self._changes += 1

    @property
    def changes(self) -> int:
        """How often others have changed this host so far."""
        with self._lock:
            return self._changes

    @property
    def counted(self) -> Counted | None:
        """What the rules had taken when the guard looked last; None: it has not said yet, and they were another
        relay's before."""
        with self._lock:
            return self._counted
