"""`tproxy-relay run`: a foreground process from its first signal handler to its last log line.

The order is what matters here. Signals are caught first, because as PID 1 a process ignores those it has no
handler for. Whatever can fail fails before READY. And the process ends by _exit, because the interpreter would
wait for every pool thread, and one of them may be blocked in a send() for as long as its peer likes; the
kernel then resets what is still open.
"""

import errno
import logging
import os
import signal
import socket
from collections.abc import MutableMapping
from typing import NoReturn

from tproxy_relay import __version__, endpoint, limits, listeners, logs, notify, sockets
from tproxy_relay.endpoint import Endpoint
from tproxy_relay.errors import CapabilityMissingError, ConfigError
from tproxy_relay.intercept import foreign_nat, plan
from tproxy_relay.intercept.managed import Interception
from tproxy_relay.policy import Destinations
from tproxy_relay.settings import Settings
from tproxy_relay.sockets import Tuning
from tproxy_relay.wakeup import Wakeup
from tproxy_relay.worker import Worker

HANDSHAKE_GRACE = 1.0
"""Seconds for the handshakes that are under way when the ruleset stops taking new connections: a round trip, and one
retransmission on a short path."""

LOG_FLUSH = 1.0
"""Seconds that the log gets at the end."""

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

log = logging.getLogger(__name__)


def run(settings: Settings, environ: MutableMapping[str, str]) -> NoReturn:
    """Relay until told to stop; ends the process. Raises RelayError if it cannot begin."""
    target = _resolve_target(settings)  # may take long: a signal still ends us
    wakeup = Wakeup()
    wakeup.catch(SIGNALS)
    if os.getpid() == 1:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # orphans of the container are ours to reap
    writer = logs.LogWriter(settings)
    writer.start()
    try:
        worker, interception = _prepare(settings, target, wakeup, environ)
    except BaseException:
        writer.stop(LOG_FLUSH)
        raise
    code = _serve(worker, interception, environ)
    writer.stop(LOG_FLUSH)
    _exit(code)


def _prepare(
    settings: Settings, target: Endpoint | None, wakeup: Wakeup, environ: MutableMapping[str, str]
) -> tuple[Worker, Interception | None]:
    tuning = Tuning(settings.keepalive, settings.user_timeout, _usable_mark(settings))
    _check_preserve_source(settings)
    _warn_of_nonlocal_bind()
    open_listeners = listeners.open_all(settings, tuning, environ)
    own_ports = frozenset(one.endpoint.port for one in open_listeners)
    room = limits.max_connections(settings.max_connections, limits.raise_descriptor_limit())
    interception = _intercept(settings, tuning.mark, own_ports)
    try:
        worker = Worker(
            settings,
            open_listeners,
            wakeup,
            tuning=tuning,
            destinations=Destinations(own_ports, target),
            max_connections=room,
        )
    except BaseException:
        if interception:
            interception.remove()
        raise
    log.info(
        "listening",
        extra={
            "version": __version__,
            "listeners": ", ".join(one.name for one in open_listeners),
            "mode": settings.mode,
            "preserve_source": settings.preserve_source,
            "max_connections": room,
            "mark": f"{tuning.mark:#x}",
        },
    )
    return worker, interception


def _intercept(settings: Settings, mark: int, own_ports: frozenset[int]) -> Interception | None:
    """The ruleset, once the listeners are there: connections that come before the accept loop wait in the backlog."""
    if not (settings.intercept_inbound or settings.intercept_outbound):
        return None
    wanted = plan.of_settings(settings, beside_nat=foreign_nat.rewrites_destinations())
    for port in wanted.listener_ports - own_ports:
        raise ConfigError(f"none of the inherited sockets listens on port {port}, where interception leads")
    if wanted.exempt_uid not in (None, os.geteuid()):
        raise ConfigError(f"user is {settings.user}, but this process runs as account number {os.geteuid()}")
    if settings.intercept_outbound and not mark and wanted.exempt_uid is None:
        raise CapabilityMissingError(
            "cannot mark sockets, so outbound interception would catch the relay itself: CAP_NET_RAW is missing; "
            f"{listeners.HOW_TO_GIVE}. Or run it as an account of its own, and name that one with --user"
        )
    interception = Interception(wanted, settings.backend)
    interception.install()
    return interception


def _serve(worker: Worker, interception: Interception | None, environ: MutableMapping[str, str]) -> int:
    def stopping() -> float:
        notify.notify("STOPPING=1", environ)
        if interception is None:
            return 0.0
        interception.drain()
        return HANDSHAKE_GRACE

    notify.notify("READY=1", environ)
    try:
        worker.run(stopping)
    except Exception:
        log.critical("the accept loop met a bug", exc_info=True)
        return 1  # and the guard does what on-failure says
    if interception is not None:
        interception.remove()
    return 0


def _exit(code: int) -> NoReturn:
    os._exit(code)


def _resolve_target(settings: Settings) -> Endpoint | None:
    """The target's address, looked up once: there is no name lookup in the path of a connection."""
    if settings.target is None:
        return None
    try:
        found = socket.getaddrinfo(*settings.target, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"target: cannot resolve {settings.target.host!r}: {error.strerror}") from error
    return endpoint.from_sockaddr(found[0][4])


def _usable_mark(settings: Settings) -> int:
    """The relay's own fwmark, the highest bit of mark-mask; 0, said once, where the kernel refuses it."""
    mark = 1 << (settings.mark_mask.bit_length() - 1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            sockets.set_mark(probe, mark)
        except PermissionError:
            log.info("no capability for SO_MARK: the ruleset must exempt the relay by its account")
            return 0
    return mark


def _warn_of_nonlocal_bind() -> None:
    for family in ("ipv4", "ipv6"):
        name = f"net.{family}.ip_nonlocal_bind"
        try:
            with open("/proc/sys/" + name.replace(".", "/"), encoding="ascii") as sysctl:
                on = sysctl.read().strip() == "1"
        except OSError:
            continue  # no such family here
        if on:
            log.warning(
                "every address looks like this host's own: no source is preserved, and destinations "
                "with the relay's port numbers are refused",
                extra={"sysctl": f"{name}=1"},
            )


def _check_preserve_source(settings: Settings) -> None:
    """Find out now, not at the first connection, whether the kernel lets us bind to foreign addresses."""
    if settings.preserve_source == "no":
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            sockets.set_transparent(probe)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
            raise CapabilityMissingError(
                f"preserve-source needs CAP_NET_RAW for each connection; {listeners.HOW_TO_GIVE}"
            ) from error
