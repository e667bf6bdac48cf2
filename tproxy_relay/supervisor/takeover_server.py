"""Where a running relay is asked to leave its listeners, and the guard of its ruleset, to one that starts.

By one relay at a time, which `takeover_client` tells more of. Others are told why not.
"""

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.intercept import plan as plans
from tproxy_relay.ipc.channel import MAX_DESCRIPTORS, Channel, Message
from tproxy_relay.net import unix_sockets
from tproxy_relay.supervisor.generation import fixed
from tproxy_relay.supervisor.state import RelayState

NAME = "tproxy_relay/relay/"
"""Of the socket, an abstract name; the process id of the supervisor comes behind it."""

PROTOCOL = 1
"""Of the messages; another one is refused."""

TAKING_TIMEOUT = 60.0
"""Seconds from the first question to `commit`; workers start in a tenth of one. Nothing else happens meanwhile."""

FULL_PAUSE = 0.05
"""Seconds that everything waits when there is no descriptor for one who asks: the question stays, and the selector
tells of it again and again."""

MAX_REFUSED = 8
"""That may be connected at the same time, before they have asked anything."""


class Commit(NamedTuple):
    """Another relay is ready, and was told that the listeners are its own from now on."""

    pid: int
    """The process id of its supervisor."""
    kept: Sequence[str]
    """The names of the listeners that it goes on with."""
    guard: int | None
    """The descriptor of a channel for the guard of the ruleset, if it takes that over; to be closed."""


class TakeoverServer:
    """Shows another relay what there is, and notes the commit of one that takes it. The data of what it registers is
    the method to call."""

    def __init__(self, selector: selectors.BaseSelector, state: RelayState) -> None:
        self._selector = selector
        self._state = state
        self._successor: _Asker | None = None
        self._refused: list[_Asker] = []
        self._until = 0.0
        self._commit: Commit | None = None
        self._socket: socket.socket | None = None

    def open(self) -> None:
        """Let others ask from now on."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        # Taken only if a process of another pid namespace has our number: then nobody can ask this relay.
        with contextlib.suppress(OSError):
            self._socket.bind(unix_sockets.abstract(f"{NAME}{os.getpid()}"))
            self._socket.listen(1)
            self._selector.register(self._socket, selectors.EVENT_READ, self._on_connection)

    @property
    def is_idle(self) -> bool:
        """True once others may ask, while nobody prepares to take over."""
        return self._socket is not None and not self.in_use

    @property
    def in_use(self) -> bool:
        """True while somebody prepares to take over."""
        return self._successor is not None and time.monotonic() < self._until

    def take_commit(self) -> Commit | None:
        """The commit that has come since the last call, if one has."""
        commit, self._commit = self._commit, None
        return commit

    def _on_connection(self) -> None:
        assert self._socket is not None
        try:
            sock, _ = self._socket.accept()
        except OSError as error:
            if error.errno == errno.EMFILE:
                time.sleep(FULL_PAUSE)
            return  # or it is gone again
        refusal = "another relay takes over already" if self.in_use else self._state.busy
        if not unix_sockets.is_trusted(unix_sockets.peer(sock).uid):
            refusal = "only root and the account of this relay may ask"
        asker = _Asker(self, Channel(sock), refusal)
        if refusal is None:
            self._turn_away()
            self._successor, self._until = asker, time.monotonic() + TAKING_TIMEOUT
        elif len(self._refused) < MAX_REFUSED:
            self._refused.append(asker)
        else:
            asker.channel.close()
            return
        self._selector.register(asker.channel, selectors.EVENT_READ, asker.on_readable)

    # --- one who asks

    def refuse(self, asker: "_Asker", why: str) -> None:
        """Answer it when the question is there: the answer would be lost with a socket that is closed before it was
        read."""
        with contextlib.suppress(ValueError):
            received = asker.channel.receive()
            for fd in received[1] if received else ():
                os.close(fd)
        asker.channel.send(self._refusal(why))
        self._refused.remove(asker)
        self._hang_up(asker)

    def receive(self, asker: "_Asker") -> None:
        """Take what the one that may take over says."""
        try:
            received = asker.channel.receive()
        except ValueError:
            received = None
        if received is None:
            self._turn_away()  # it has ended, and nothing has changed
            return
        message, descriptors = received
        try:
            self._handle(asker.channel, message, descriptors)
        except RelayError as error:
            asker.channel.send(self._refusal(str(error)))
        finally:
            for fd in descriptors:
                os.close(fd)

    def _refusal(self, why: str) -> Message:
        """With the listeners, by the settings: that is how a relay is found."""
        return {"refused": why, "listeners": [listener.wanted for listener in self._state.generation.listeners]}

    def _handle(self, asking: Channel, message: Message, descriptors: list[int]) -> None:
        """Takes a descriptor that it keeps from the list."""
        if "commit" not in message:
            if message.get("protocol") != PROTOCOL:
                raise SystemRefusedError("it is of another version")
            self._offer(asking)
            return
        if not self.in_use:
            raise SystemRefusedError(f"it took more than {TAKING_TIMEOUT:g} s to get ready")
        pid, kept = message["commit"], message.get("kept")
        if type(pid) is not int or not isinstance(kept, list):
            raise SystemRefusedError("it is of another version")
        if self._state.busy is not None:
            raise SystemRefusedError(self._state.busy)
        if asking.send({"committed": os.getpid()}):  # otherwise it has given up
            self._commit = Commit(pid, kept, descriptors.pop(0) if descriptors else None)

    def _offer(self, to: Channel) -> None:
        """Show what there is. Raises SystemRefusedError if that is more than a message can take."""
        generation = self._state.generation
        if len(generation.listeners) > MAX_DESCRIPTORS:
            raise SystemRefusedError(f"it has more than {MAX_DESCRIPTORS} listeners")
        message = {
            "protocol": PROTOCOL,
            "listeners": [listener.wanted for listener in generation.listeners],
            "fixed": fixed(generation.settings),
            "plan": None if generation.plan is None else plans.to_json(generation.plan),
        }
        to.send(message, [listener.sock.fileno() for listener in generation.listeners])

    def _turn_away(self) -> None:
        if self._successor is not None:
            self._hang_up(self._successor)
            self._successor = None

    def _hang_up(self, asker: "_Asker") -> None:
        self._selector.unregister(asker.channel)
        asker.channel.close()

    def close(self) -> None:
        """Answer nobody any more. It may be called again, and before `open`."""
        self._turn_away()
        for asker in self._refused:
            self._hang_up(asker)
        self._refused.clear()
        if self._socket is not None:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(self._socket)
            self._socket.close()


class _Asker:
    """One that has connected; with a refusal, it is told that."""

    def __init__(self, server: TakeoverServer, channel: Channel, refusal: str | None) -> None:
        self.channel = channel
        self._server = server
        self._refusal = refusal

    def on_readable(self) -> None:
        if self.channel.fileno() < 0:
            return  # it was closed in the same turn of the loop
        if self._refusal is None:
            self._server.receive(self)
        else:
            self._server.refuse(self, self._refusal)
