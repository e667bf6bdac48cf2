"""A relay that starts takes over from the one that runs: its listening sockets, and the guard of its ruleset.

They talk over a unix socket with an abstract name (unix(7)), which is found only in the same network namespace,
where the listeners are too. The one that starts asks for the listeners, brings its workers up beside the old ones,
and says `commit`. Until then it may end at any time, and nothing has changed. `takeover_server` is the other side.
"""

import logging
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from tproxy_relay.errors import ConfigError, RelayError, SystemRefusedError
from tproxy_relay.guard.guard_client import Interception
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import ruleset
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel, Message
from tproxy_relay.net import listeners, unix_sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.settings import Settings
from tproxy_relay.supervisor.generation import Generation, fixed
from tproxy_relay.supervisor.takeover_server import NAME, PROTOCOL

ANSWER_TIMEOUT = 5.0
"""Seconds for an answer; it takes some milliseconds, but the other relay may be busy with its ruleset."""

log = logging.getLogger(__name__)


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
        """Want nothing: the other relay sees the end of the channel, and goes on."""
        self.channel.close()


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


def take_over(offer: Offer, generation: Generation) -> Interception | None:
    """Everything is ready: from now on the clients are ours. Returns the ruleset; None if nothing is intercepted.
    Raises RelayError as long as they are not ours."""
    if offer.plan is None:
        return _take_listeners(offer, generation)
    if generation.plan is None:
        raise ConfigError(f"process {offer.pid} intercepts, and this relay would not: stop that one first")
    ruleset.refuse_losses(offer.plan, generation.plan)
    ours, guards = channel.pair()
    try:
        offer.commit(generation.listeners, guards.fileno())
    finally:
        guards.close()
    interception = Interception.take_over(ours, generation.plan, generation.settings.backend)
    try:
        interception.replace(generation.plan)
    except RelayError as error:
        log.error("the ruleset stays as it was: %s", error)  # it leads here, and the other relay is ending
    return interception


def _take_listeners(offer: Offer, generation: Generation) -> Interception | None:
    """From a relay that does not intercept; this one perhaps does."""
    interception = None
    if generation.plan is not None:
        interception = Interception(generation.plan, generation.settings.backend)
        interception.install()
    try:
        offer.commit(generation.listeners, None)
    except BaseException:
        if interception is not None:
            interception.remove()
        raise
    return interception


def _connect(pid: int) -> Channel | None:
    """None if it has just ended, does not answer, or is not to be trusted."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(ANSWER_TIMEOUT)
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
        return asking.receive(ANSWER_TIMEOUT)
    except TimeoutError:
        asking.shut()
        answer = asking.receive()
        if answer is None:
            raise
        return answer
