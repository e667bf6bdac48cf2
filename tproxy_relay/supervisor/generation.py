"""From settings to all that the workers will need: what can be wrong is found here, and nothing that is running is
touched.

The same for the start and for a reload, which only has some listeners already.
"""

import errno
import logging
import os
import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tproxy_relay.errors import CapabilityMissingError, ConfigError, SystemRefusedError
from tproxy_relay.intercept import foreign_nat, plan
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.net import endpoint, listeners, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.relay.policy import Policy
from tproxy_relay.settings import HostPort, Settings
from tproxy_relay.system import cpu, limits, privileges
from tproxy_relay.worker.spec import WorkerSpec

FIXED = ("mode", "interface", "backend", "mark_mask", "route_table", "route_priority")
"""Settings that live connections depend on: with other marks, routes or listeners the kernel would not know them."""

LOOKUP_TIMEOUT = 3.0
"""Seconds for the address of `target`, by name. At a reload, nothing else is done meanwhile."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A configuration that can be put in force."""

    settings: Settings
    listeners: tuple[Listener, ...]
    tuning: Tuning
    """Of the listeners."""
    plan: Plan | None
    """Of the ruleset; None: there is nothing to intercept."""
    spec: WorkerSpec
    command: tuple[str, ...]
    """That becomes a worker with the right account and capabilities."""
    workers: int
    cpus: tuple[int, ...]
    """The processors that the workers stay on; empty: wherever the scheduler wants."""


def prepare(settings: Settings, kept: Sequence[Listener], *, inherited: bool) -> Prepared:
    """Everything for these settings. `kept` are the listeners that there are; all of them and no others if they
    were `inherited`. Raises RelayError, and has opened nothing then."""
    try:
        return _prepare(settings, kept, inherited)
    except OSError as error:  # descriptors have run out
        raise SystemRefusedError(f"cannot prepare for these settings: {error.strerror}") from error


def _prepare(settings: Settings, kept: Sequence[Listener], inherited: bool) -> Prepared:
    target = _resolve_target(settings)
    keep = _capabilities(settings)
    account = None if settings.user is None else privileges.account(settings.user)
    command = privileges.for_worker(account, keep)
    if os.geteuid() == 0 and (account is None or account.uid == 0) and not privileges.held().has("setpcap"):
        log.warning("workers keep all capabilities of this root: without CAP_SETPCAP it takes --user to have less")
    mark = _usable_mark(settings)
    tuning = Tuning(settings.keepalive, settings.user_timeout, mark)
    ready = list(kept) if inherited else listeners.open_all(settings, tuning, kept)
    try:
        own_ports = frozenset(one.endpoint.port for one in ready)
        workers = settings.workers or cpu.worth()
        descriptors, memory = limits.raise_descriptor_limit(), limits.usable_memory()
        spec = WorkerSpec(
            settings,
            Tuning(settings.keepalive, settings.user_timeout, mark if "net_raw" in keep else 0),
            Policy.of_settings(settings, own_ports | _admin_port(settings), target),
            limits.of_relay(settings.max_connections, descriptors, len(ready), workers, memory),
        )
        wanted = _plan(settings, spec.tuning.mark, own_ports)
    except BaseException:
        listeners.close_all([one for one in ready if one not in kept])
        raise
    cpus = cpu.cpus(settings.cpu_affinity, workers)
    return Prepared(settings, tuple(ready), tuning, wanted, spec, tuple(command), workers, cpus)


def _admin_port(settings: Settings) -> frozenset[int]:
    """No client is to look into the relay by way of the relay."""
    return frozenset({settings.admin.port} if isinstance(settings.admin, HostPort) else ())


def fixed(settings: Settings) -> dict[str, object]:
    """What neither a reload nor a hand-over can change, by the names of the options."""
    return {name.replace("_", "-"): getattr(settings, name) for name in FIXED}


def _capabilities(settings: Settings) -> tuple[str, ...]:
    """That the workers keep. CAP_NET_RAW lets them borrow the clients' addresses, and mark their sockets: that is how
    the ruleset knows them, unless they have an account of their own."""
    mine = privileges.held()
    if settings.preserve_source != "no" and not mine.has("net_raw"):
        raise CapabilityMissingError(f"preserve-source needs CAP_NET_RAW for each connection; {listeners.HOW_TO_GIVE}")
    wanted = settings.preserve_source != "no" or settings.user is None
    return ("net_raw",) if wanted and mine.has("net_raw") else ()


def _plan(settings: Settings, mark: int, own_ports: frozenset[int]) -> Plan | None:
    """The ruleset, with no way for the relay to intercept itself."""
    if not (settings.intercept_inbound or settings.intercept_outbound):
        return None
    wanted = plan.of_settings(settings, beside_nat=foreign_nat.rewrites_destinations())
    for port in wanted.listener_ports - own_ports:
        raise ConfigError(f"none of the inherited sockets listens on port {port}, where interception leads")
    if settings.intercept_outbound and not mark and wanted.exempt_uid is None:
        raise CapabilityMissingError(
            "cannot mark sockets, so outbound interception would catch the relay itself: CAP_NET_RAW is missing; "
            f"{listeners.HOW_TO_GIVE}. Or let its workers run as an account of their own, and name that one with --user"
        )
    return wanted


def _resolve_target(settings: Settings) -> Endpoint | None:
    """The target's address, looked up once: there is no name lookup in the path of a connection."""
    if settings.target is None:
        return None
    answers: queue.SimpleQueue[Endpoint | OSError] = queue.SimpleQueue()
    threading.Thread(target=_look_up, args=(settings.target, answers), name="lookup", daemon=True).start()
    try:
        found = answers.get(timeout=LOOKUP_TIMEOUT)
    except queue.Empty:
        found = TimeoutError(errno.ETIMEDOUT, f"no answer from the name servers within {LOOKUP_TIMEOUT:g} s")
    if isinstance(found, OSError):
        raise ConfigError(f"target: cannot resolve {settings.target.host!r}: {found.strerror}") from found
    return found


def _look_up(target: HostPort, answers: "queue.SimpleQueue[Endpoint | OSError]") -> None:
    """In a thread of its own: the resolver may try for minutes, and a reload has workers to look after."""
    try:
        answers.put(endpoint.from_sockaddr(socket.getaddrinfo(*target, type=socket.SOCK_STREAM)[0][4]))
    except OSError as error:
        answers.put(error)


def _usable_mark(settings: Settings) -> int:
    """The relay's own fwmark, the highest bit of mark-mask; 0 where the kernel refuses it."""
    mark = 1 << (settings.mark_mask.bit_length() - 1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            sockets.set_mark(probe, mark)
        except PermissionError:
            return 0
    return mark


def warn_of_nonlocal_bind() -> None:
    """Say in the log what a sysctl of this host takes from the relay."""
    for family in ("ipv4", "ipv6"):
        name = f"net.{family}.ip_nonlocal_bind"
        try:
            with open("/proc/sys/" + name.replace(".", "/"), encoding="ascii") as sysctl:
                on = sysctl.read().strip() == "1"
        except OSError:
            continue  # no such family here
        if on:
            log.warning(
                "this host's own addresses are hard to tell from others: of several in the same network, all but the "
                "first count as others, and connections to services there are not denied",
                extra={"sysctl": f"{name}=1"},
            )
