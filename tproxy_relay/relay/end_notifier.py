"""Who wants to know that a connection has ended: the main thread of its worker, or another worker.

Connections tell nobody above them; they tell this, and it wakes whoever waits.
"""

from tproxy_relay.ipc.slot import Slot
from tproxy_relay.system.wakeup import Wakeup


class EndNotifier:
    """One worker's. What is awaited is set by the main thread only; `notify` comes from any thread."""

    def __init__(self, slot: Slot, wakeup: Wakeup) -> None:
        self._slot = slot
        self._wakeup = wakeup
        self.all_awaited = False
        """Each end wakes the main thread: the worker leaves when the last connection has ended."""
        self._room_awaited = False
        self._room_came = False

    def await_room(self) -> None:
        """The next end wakes the main thread, which has no room for a client."""
        self._room_came = False
        self._room_awaited = True

    def await_no_room(self) -> None:
        """There is room, as far as the main thread knows."""
        self._room_awaited = False

    @property
    def room_came(self) -> bool:
        """True if a connection has ended since `await_room`, and the main thread still waits for that."""
        return self._room_awaited and self._room_came

    def notify(self) -> None:
        """A connection has ended and given everything back."""
        if self._room_awaited:
            self._room_came = True
        elif self._slot.others_wait:
            self._slot.scoreboard.ring()
        if self._room_awaited or self.all_awaited:
            self._wakeup.notify()
