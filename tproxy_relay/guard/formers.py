"""Relays before the present one, which finish their transfers: the guard's channels to them.

What they say means nothing, but the end of it does. They are told when no rule takes new connections any more, and
when the rules go that know of those that they have.
"""

import os
import select
import time
from collections.abc import Sequence

from tproxy_relay.guard import messages
from tproxy_relay.guard.messages import Orphaned
from tproxy_relay.ipc.channel import Channel

FAREWELL_TIMEOUT = 1.5
"""Seconds for former relays to reset what they have, before the rules go that know of it."""


class Formers:
    """Those of them that have not ended. False where there are none."""

    def __init__(self) -> None:
        self._channels: list[Channel] = []

    def __bool__(self) -> bool:
        return bool(self._channels)

    def add(self, talk: Channel) -> None:
        """The present one has become one of them."""
        self._channels.append(talk)

    def receive(self, former: Channel) -> bool:
        """Read what it says, and forget that. False if it was the end of it; then it is none of them any more."""
        received = messages.receive_order(former)
        for fd in received[1] if received else ():
            os.close(fd)
        if received is None:
            self._channels.remove(former)
        return received is not None

    def send_orphaned(self, *, at_once: bool = False) -> None:
        """Say that nobody's rules take new connections; `at_once`: and that they should reset those that they have."""
        for former in self._channels:
            messages.send_event(former, Orphaned(at_once))

    def part(self) -> None:
        """Wait for their end, but not for long: those that are left reset their connections, which would hang without
        the rules."""
        self.send_orphaned(at_once=True)
        until = time.monotonic() + FAREWELL_TIMEOUT
        while self._channels and (left := until - time.monotonic()) > 0:
            for former in self._ready(left):
                if not self.receive(former):
                    former.close()

    def leave(self) -> None:
        """Have none any more: the rules stay, whatever becomes of them."""
        self._channels.clear()

    def _ready(self, seconds: float) -> Sequence[Channel]:
        return select.select(self._channels, [], [], seconds)[0]
