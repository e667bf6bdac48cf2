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
from dataclasses import dataclass, replace

from tproxy_relay.errors import CapabilityMissingError, ConfigError, SystemRefusedError
from tproxy_relay.intercept import backends, plan, planning, routing
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.net import endpoint, listeners, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import Listener
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.relay.policy import Policy
from tproxy_relay.settings import HostPort, Settings
from tproxy_relay.system import cpu, limits, privileges
from tproxy_relay.system.limits import Limits
from tproxy_relay.worker.spec import WorkerSpec

FIXED = ("mode", "interface", "backend", "mark_mask", "route_table", "route_priority")
"""Settings that live connections depend on: with other marks, routes or listeners the kernel would not know them."""

LOOKUP_TIMEOUT = 3.0
"""Seconds for the address of `target`, by name. At a reload, nothing else is done meanwhile."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pool:
    """How many workers a generation has, and what they are."""

    size: int
    """How many there are to be."""
    command: tuple[str, ...]
    """That becomes a worker with the right account and capabilities."""
    cpus: tuple[int, ...]
    """The processors that they stay on; empty: wherever the scheduler wants."""
    can_mark: bool
    """If they may mark the sockets that they open."""


@dataclass(frozen=True)
class Generation:
    """Settings that can be put in force, or are, and all that its workers need."""

    number: int
    """1 for the first one of a relay."""
    settings: Settings
    listeners: tuple[Listener, ...]
    tuning: Tuning
    """Of the listeners."""
    plan: Plan | None
    """Of the ruleset; None: there is nothing to intercept."""
    policy: Policy
    limits: Limits
    pool: Pool

    @property
    def worker_tuning(self) -> Tuning:
        """Of the sockets that the workers open."""
        return self.tuning if self.pool.can_mark else replace(self.tuning, mark=0)

    @property
    def spec(self) -> WorkerSpec:
        """What each of its workers is sent."""
        return WorkerSpec(self.settings, self.worker_tuning, self.policy, self.limits)

    def tune(self) -> None:
        """Set what the connections that the listeners accept inherit. Raises SystemRefusedError."""
        for listener in self.listeners:
            listeners.tune(listener, self.tuning)
        self.confine()

    def confine(self) -> None:
        """Let in only clients that come in by `interface`, as it is now. Raises SystemRefusedError."""
        for listener in self.listeners:
            listeners.confine(listener, self.settings.interface)


def prepare(settings: Settings, kept: Sequence[Listener], *, number: int, inherited: bool) -> Generation:
    """Everything for these settings. `kept` are the listeners that there are; all of them and no others if they
    were `inherited`. Raises RelayError, and has opened nothing then."""
    try:
        return _prepare(settings, kept, number, inherited)
    except OSError as error:  # descriptors have run out
        raise SystemRefusedError(f"cannot prepare for these settings: {error.strerror}") from error


def _prepare(settings: Settings, kept: Sequence[Listener], number: int, inherited: bool) -> Generation:
    target = resolve_target(settings)
    keep = worker_capabilities(settings)
    command = _command(settings, keep)
    mark, can_mark = usable_mark(settings), "net_raw" in keep
    tuning = Tuning(settings.keepalive, settings.user_timeout, mark)
    ready = list(kept) if inherited else listeners.open_all(settings, tuning, kept)
    try:
        own_ports = frozenset(one.endpoint.port for one in ready)
        size = settings.workers or cpu.worth()
        descriptors, memory = limits.raise_descriptor_limit(), limits.usable_memory()
        policy = Policy.of_settings(settings, own_ports | _admin_port(settings), target)
        room = limits.of_relay(settings.max_connections, descriptors, len(ready), size, memory)
        wanted = wanted_plan(settings, mark if can_mark else 0, own_ports)
    except BaseException:
        listeners.close_all([one for one in ready if one not in kept])
        raise
    pool = Pool(size, command, cpu.cpus(settings.cpu_affinity, size), can_mark)
    return Generation(number, settings, tuple(ready), tuning, wanted, policy, room, pool)


def _command(settings: Settings, keep: Sequence[str]) -> tuple[str, ...]:
    """Becomes a worker that keeps these capabilities. Raises RelayError for an account that cannot be."""
    account = None if settings.user is None else privileges.account(settings.user)
    command = privileges.for_worker(account, keep)
    if os.geteuid() == 0 and (account is None or account.uid == 0) and not privileges.held().has("setpcap"):
        log.warning("workers keep all capabilities of this root: without CAP_SETPCAP it takes --user to have less")
    return tuple(command)


def _admin_port(settings: Settings) -> frozenset[int]:
    """No client is to look into the relay by way of the relay."""
    return frozenset({settings.admin.port} if isinstance(settings.admin, HostPort) else ())


def fixed(settings: Settings) -> dict[str, object]:
    """What neither a reload nor a hand-over can change, by the names of the options."""
    return {name.replace("_", "-"): getattr(settings, name) for name in FIXED}


def worker_capabilities(settings: Settings) -> tuple[str, ...]:
    """The names of the capabilities that the workers keep. CAP_NET_RAW lets them borrow clients' addresses, and mark
    their sockets: that is how the ruleset knows them, unless they have an account of their own. Raises
    CapabilityMissingError."""
    mine = privileges.held()
    if settings.preserve_source != "no" and not mine.has("net_raw"):
        raise CapabilityMissingError(f"preserve-source needs CAP_NET_RAW for each connection; {listeners.HOW_TO_GIVE}")
    wanted = settings.preserve_source != "no" or settings.user is None
    return ("net_raw",) if wanted and mine.has("net_raw") else ()


def wanted_plan(settings: Settings, mark: int, own_ports: frozenset[int]) -> Plan | None:
    """The plan of the ruleset, with no way for the relay to intercept itself: its workers mark their sockets so (0: not
    at all), and its listeners have these ports. None if nothing is to be intercepted. Raises RelayError."""
    if not (settings.intercept_inbound or settings.intercept_outbound):
        return None
    wanted = _as_can_be(planning.for_host(settings), settings)
    for port in wanted.listener_ports - own_ports:
        raise ConfigError(f"none of the inherited sockets listens on port {port}, where interception leads")
    if settings.intercept_outbound and not mark and wanted.exempt_uid is None:
        raise CapabilityMissingError(
            "cannot mark sockets, so outbound interception would catch the relay itself: CAP_NET_RAW is missing; "
            f"{listeners.HOW_TO_GIVE}. Or let its workers run as an account of their own, and name that one with --user"
        )
    return wanted


def _as_can_be(wanted: Plan, settings: Settings) -> Plan:
    """Without IPv6, where that is off and the programs for its rules are not there: no reason not to start."""
    if plan.IPV6 not in wanted.families or routing.ipv6_is_on() or backends.can_do(settings.backend, wanted, plan.IPV6):
        return wanted
    log.warning("IPv6 is off, and ip6tables does not work here: IPv4 only, until a reload finds it otherwise")
    return replace(wanted, listen={plan.IPV4: wanted.listen[plan.IPV4]}) if plan.IPV4 in wanted.families else wanted


def resolve_target(settings: Settings) -> Endpoint | None:
    """The target's address, looked up once: there is no name lookup in the path of a connection. None without a target.
    Raises ConfigError."""
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


def usable_mark(settings: Settings) -> int:
    """The relay's own fwmark, the highest bit of mark-mask; 0 where the kernel refuses it."""
    mark = 1 << (settings.mark_mask.bit_length() - 1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            sockets.set_mark(probe, mark)
        except PermissionError:
            return 0
    return mark


def warn_of_nonlocal_bind() -> None:
    """Warn in the log if a sysctl of this host keeps the relay from knowing all of its own addresses."""
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
