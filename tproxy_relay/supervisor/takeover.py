"""A relay that starts takes over from the one that runs: its listening sockets, and the guard of its ruleset.

They talk over a unix socket with an abstract name (unix(7)), which is found only in the same network namespace,
where the listeners are too. The one that starts asks for the listeners, brings its workers up beside the old ones,
and says `commit`. Until then it may end at any time, and nothing has changed.
"""

import contextlib
import errno
import os
import selectors
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.ipc.channel import MAX_DESCRIPTORS, Channel, Message
from tproxy_relay.net import listeners, unix_sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor.generation import fixed

NAME = "tproxy_relay/relay/"
"""Of the socket, an abstract name; the process id of the supervisor comes behind it."""

PROTOCOL = 1
"""Of the messages; another one is refused."""

PATIENCE = 5.0
"""Seconds for an answer; it takes some milliseconds, but the other relay may be busy with its ruleset."""

TAKING_TIMEOUT = 60.0
"""Seconds from the first question to `commit`; workers start in a tenth of one. Nothing else happens meanwhile."""

FULL_PAUSE = 0.05
"""Seconds that everything waits when there is no descriptor for one who asks: the question stays, and the selector
tells of it again and again."""

MAX_REFUSED = 8
"""That may be connected at the same time, before they have asked anything."""


class Giver(Protocol):
    """A running relay, as its door needs it."""

    @property
    def listening(self) -> list[Endpoint]:
        """Where, by its settings: that is how it is found."""

    @property
    def busy(self) -> str | None:
        """What keeps it from being taken over now; None if nothing does."""

    def offer_to(self, successor: Channel) -> None:
        """Show what there is (`offer`)."""

    def hand_over(self, pid: int, kept: Sequence[str], guard: int | None) -> None:
        """Leave the listeners of these names to that process, and the ruleset if there is a channel for the guard."""


class Door:
    """Where a running relay can be asked, by one at a time. `selector` tells of it, with the door as its data."""

    def __init__(self, selector: selectors.BaseSelector, giver: Giver) -> None:
        self._selector = selector
        self._giver = giver
        self._asking: Channel | None = None
        self._refused: dict[Channel, str] = {}
        self._until = 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        # Taken only if a process of another pid namespace has our number: then nobody can ask this relay.
        with contextlib.suppress(OSError):
            self._socket.bind(unix_sockets.abstract(f"{NAME}{os.getpid()}"))
            self._socket.listen(1)
            selector.register(self._socket, selectors.EVENT_READ, self)

    @property
    def in_use(self) -> bool:
        """True while somebody prepares to take over."""
        return self._asking is not None and time.monotonic() < self._until

    def fired(self, source: object) -> None:
        """The selector has told of this one of the door's sockets."""
        if source is self._socket:
            self._let_in()
        elif isinstance(source, Channel) and source is self._asking:
            self._hear(source)
        elif isinstance(source, Channel) and source in self._refused:  # not one that has just been closed
            self._refuse(source)

    def _let_in(self) -> None:
        try:
            sock, _ = self._socket.accept()
        except OSError as error:
            if error.errno == errno.EMFILE:
                time.sleep(FULL_PAUSE)
            return  # or it is gone again
        asking = Channel(sock)
        busy = "another relay takes over already" if self.in_use else self._giver.busy
        if not unix_sockets.is_trusted(unix_sockets.peer(sock).uid):
            busy = "only root and the account of this relay may ask"
        if busy is None:
            self._turn_away()
            self._asking, self._until = asking, time.monotonic() + TAKING_TIMEOUT
        elif len(self._refused) < MAX_REFUSED:
            self._refused[asking] = busy
        else:
            asking.close()
            return
        self._selector.register(asking, selectors.EVENT_READ, self)

    def _refuse(self, asking: Channel) -> None:
        """When the question is there: the answer would be lost with a socket that is closed before it was read."""
        with contextlib.suppress(ValueError):
            told = asking.receive()
            for fd in told[1] if told else ():
                os.close(fd)
        asking.send(self._refusal(self._refused.pop(asking)))
        self._selector.unregister(asking)
        asking.close()

    def _hear(self, asking: Channel) -> None:
        try:
            told = asking.receive()
        except ValueError:
            told = None
        if told is None:
            self._turn_away()  # it has ended, and nothing has changed
            return
        message, descriptors = told
        try:
            self._obey(asking, message, descriptors)
        except RelayError as error:
            asking.send(self._refusal(str(error)))
        finally:
            for fd in descriptors:
                os.close(fd)

    def _refusal(self, why: str) -> Message:
        return {"refused": why, "listeners": self._giver.listening}

    def _obey(self, asking: Channel, message: Message, descriptors: Sequence[int]) -> None:
        if "commit" not in message:
            if message.get("protocol") != PROTOCOL:
                raise SystemRefusedError("it is of another version")
            self._giver.offer_to(asking)
            return
        if not self.in_use:
            raise SystemRefusedError(f"it took more than {TAKING_TIMEOUT:g} s to get ready")
        pid, kept = message["commit"], message.get("kept")
        if type(pid) is not int or not isinstance(kept, list):
            raise SystemRefusedError("it is of another version")
        if self._giver.busy is not None:
            raise SystemRefusedError(self._giver.busy)
        if asking.send({"committed": os.getpid()}):  # otherwise it has given up
            self._giver.hand_over(pid, kept, descriptors[0] if descriptors else None)
            self.close()

    def _turn_away(self) -> None:
        if self._asking is not None:
            self._selector.unregister(self._asking)
            self._asking.close()
            self._asking = None

    def close(self) -> None:
        """Answer nobody any more."""
        self._turn_away()
        for asking in self._refused:
            self._selector.unregister(asking)
            asking.close()
        self._refused.clear()
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._socket)
        self._socket.close()


class Offer(NamedTuple):
    """What a running relay has to give."""

    channel: Channel
    pid: int
    listeners: list[Listener]
    plan: Plan | None
    """Of its ruleset; None: it does not intercept."""

    def commit(self, kept: Sequence[Listener], guard: int | None) -> None:
        """Take it; with an end of a channel for the guard to talk to, if the ruleset is taken over too. Raises
        SystemRefusedError if the other one does not give it."""
        names = [listener.name for listener in kept]
        self.channel.send({"commit": os.getpid(), "kept": names}, [] if guard is None else [guard])
        _refuse_refusal(_answer(self.channel, self.pid)[0], self.pid)

    def close(self) -> None:
        """Want nothing."""
        self.channel.close()


def offer(to: Channel, settings: Settings, ours: Sequence[Listener], plan: Plan | None) -> None:
    """Answer one who asks. Raises SystemRefusedError if there is more than a message can take."""
    if len(ours) > MAX_DESCRIPTORS:
        raise SystemRefusedError(f"it has more than {MAX_DESCRIPTORS} listeners")
    message = {
        "protocol": PROTOCOL,
        "listeners": [listener.wanted for listener in ours],
        "fixed": fixed(settings),
        "plan": None if plan is None else plans.to_json(plan),
    }
    to.send(message, [listener.sock.fileno() for listener in ours])


def find(settings: Settings) -> Offer | None:
    """The relay of this network namespace that has one of the listeners of these settings; None if there is none.
    Raises SystemRefusedError if it cannot be taken over."""
    refusal = None
    for pid in unix_sockets.numbered(NAME):
        asking = _connect(pid)
        if asking is None:
            continue
        try:
            found = _ask(asking, pid, settings)
        except RelayError as error:
            refusal = error  # perhaps it is not the one: others may run beside it, with other listeners
        else:
            if found is not None:
                return found
        asking.close()
    if refusal is not None:
        raise refusal
    return None


def _connect(pid: int) -> Channel | None:
    """None if it has just ended, does not answer, or is not to be trusted."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(unix_sockets.abstract(f"{NAME}{pid}"))
        # Anybody could have taken the name.
        if unix_sockets.is_trusted(unix_sockets.peer(sock).uid):
            return Channel(sock)
    except OSError:
        pass
    sock.close()
    return None


def _ask(asking: Channel, pid: int, settings: Settings) -> Offer | None:
    """None if it has other listeners."""
    asking.send({"want": "listeners", "protocol": PROTOCOL})
    message, descriptors = _answer(asking, pid)
    offered = [socket.socket(fileno=fd) for fd in descriptors]
    found = None
    try:
        found = _understood(asking, pid, settings, message, offered)
    except (ValueError, KeyError, TypeError) as error:
        raise _differs(pid, "version") from error
    finally:
        if found is None:
            for sock in offered:
                sock.close()
    return found


def _understood(
    asking: Channel, pid: int, settings: Settings, message: Message, offered: Sequence[socket.socket]
) -> Offer | None:
    addresses = [Endpoint(*address) for address in message["listeners"]]
    wanted = [Endpoint(host, port) for host in settings.bind for port in settings.ports]
    if not any(listeners.overlap(one, other) for one in addresses for other in wanted):
        return None
    _refuse_refusal(message, pid)
    if message["protocol"] != PROTOCOL:
        raise _differs(pid, "version")
    differing = [name for name, value in fixed(settings).items() if message["fixed"].get(name) != value]
    if differing:
        raise _differs(pid, ", ".join(differing))
    plan = None if message["plan"] is None else plans.from_json(message["plan"])
    return Offer(asking, pid, [Listener(sock, address) for sock, address in zip(offered, addresses)], plan)


def _differs(pid: int, what: str) -> SystemRefusedError:
    return SystemRefusedError(f"cannot take over from process {pid}: its {what} differs; stop it, and start again")


def _answer(asking: Channel, pid: int) -> tuple[Message, list[int]]:
    try:
        answer = _last_answer(asking)
    except (TimeoutError, ValueError) as error:
        raise SystemRefusedError(f"process {pid}, a relay, gives no sensible answer") from error
    if answer is None:
        raise SystemRefusedError(f"cannot take over from process {pid}: it has ended")
    return answer


def _refuse_refusal(message: Message, pid: int) -> None:
    if "refused" in message:
        raise SystemRefusedError(f"cannot take over from process {pid}: {message['refused']}")


def _last_answer(asking: Channel) -> tuple[Message, list[int]] | None:
    """Both sides agree on whether it has come in time. Raises TimeoutError if it has not."""
    try:
        return asking.receive(PATIENCE)
    except TimeoutError:
        asking.shut()
        answer = asking.receive()
        if answer is None:
            raise
        return answer
