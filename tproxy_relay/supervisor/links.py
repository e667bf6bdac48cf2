"""The interface of `interface`: it may come after the relay, go, come back and be renamed.

The listeners let in whoever comes in by the interface of that name. The kernel knows it by a number, which is another
one each time that it is made; so that is looked up when the kernel tells that links have changed, and once a second.
"""

import logging
import selectors
import socket
import time

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.logs.repeats import Complaint
from tproxy_relay.net import rtnetlink
from tproxy_relay.supervisor.state import RelayState

LOOK_INTERVAL = 1.0
"""Seconds between two looks, for a process that netlink is kept from. A look takes some microseconds."""

log = logging.getLogger(__name__)


class Links:
    """Keeps the listeners of the generation in force to the interface of their settings."""

    def __init__(self, selector: selectors.BaseSelector, state: RelayState) -> None:
        self._selector = selector
        self._state = state
        self._absence = Complaint()
        self._trouble = Complaint()
        self._confined: tuple[int, int] | None = None
        """The generation, and the number of the interface that its listeners are kept to."""
        self._look_at: float | None = None
        try:
            self._socket: socket.socket | None = rtnetlink.listen(socket.NETLINK_ROUTE, (rtnetlink.LINK,))
        except OSError:  # not in this kernel, or kept from us by a service manager
            self._socket = None
        else:
            selector.register(self._socket, selectors.EVENT_READ, self._on_change)

    @property
    def deadline(self) -> float | None:
        """When `tick` has something to look at (time.monotonic()); None: there is no interface to look for."""
        return self._look_at

    def tick(self, now: float) -> None:
        """Look if it is time to; `now` is time.monotonic()."""
        generation = self._state.current
        if generation is None or generation.settings.interface is None or self._state.ending:
            self._look_at = None
            return
        fresh = self._confined is None or self._confined[0] != generation.number
        if fresh or self._look_at is None or now >= self._look_at:
            self._look(generation.settings.interface)
            self._look_at = now + LOOK_INTERVAL

    def close(self) -> None:
        """Hear nothing any more. It may be called again."""
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _on_change(self) -> None:
        assert self._socket is not None
        for _ in rtnetlink.messages(self._socket):
            self._look_at = time.monotonic()  # in this turn of the loop

    def _look(self, interface: str) -> None:
        generation = self._state.generation
        found = (generation.number, rtnetlink.index_of(interface))
        if found == self._confined and not self._trouble:
            return
        try:
            generation.confine()
        except SystemRefusedError as error:
            if self._trouble.begins(str(error)):
                log.error("%s", error)
            return
        self._trouble.ends()
        first, self._confined = self._confined is None, found
        self._state.missing_interface = None if found[1] else interface
        if found[1]:
            if self._absence.ends():
                log.info("interface %s is there: its clients are served", interface)
        elif self._absence.begins("not yet" if first else "gone"):
            log.warning(
                "interface %s is not there yet: nothing is intercepted until it comes"
                if first
                else "interface %s is gone: nothing is intercepted until it is back",
                interface,
            )
