"""What the system lets the relay have: ports, descriptors, threads, room in the backlog."""

import errno
import os
import resource
from collections.abc import Iterator
from typing import Any

from tproxy_relay.check import host
from tproxy_relay.check.context import Case, is_relay
from tproxy_relay.check.finding import Finding, ok, problem, set_sysctl, warning
from tproxy_relay.net import listeners, proc_net
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.listeners import BACKLOG
from tproxy_relay.system import cgroup, limits

THREADS_EACH = 2
MAPS_EACH = 2
"""Memory maps of a thread: its stack, and the page that guards it."""
OTHER_THREADS = 64
OTHER_MAPS = 2000
MIN_PORTS = 1024
"""Fewer ports for outgoing connections than these are soon used up by one busy server."""
UNPRIVILEGED = "net.ipv4.ip_unprivileged_port_start"
"""The first port that takes no CAP_NET_BIND_SERVICE (ip-sysctl.rst)."""
USUAL_PORTS = "32768 60999"
"""net.ipv4.ip_local_port_range as the kernel has it at first."""


def probe_ports(case: Case) -> Iterator[Finding]:
    """Can every listener be bound? Those of a running relay count as free."""
    settings = case.settings
    free = []
    for address in settings.bind:
        for port in settings.ports:
            refusal = _try_to_bind(Endpoint(address, port), settings.interface)
            if refusal is None:
                free.append(port)
                continue
            yield from _about_refusal(case, Endpoint(address, port), refusal)
    if len(free) == len(settings.ports) * len(settings.bind):
        yield ok("ports", f"ports {', '.join(map(str, settings.ports))} are free")


def probe_ephemeral_ports(case: Case) -> Iterator[Finding]:
    """The ports that outgoing connections get: not the listeners', and enough of them."""
    bounds = (host.sysctl("net.ipv4.ip_local_port_range") or "").split()
    if len(bounds) != 2:
        return
    first, last = map(int, bounds)
    reserved = host.sysctl("net.ipv4.ip_local_reserved_ports") or ""
    taken = [port for port in case.settings.ports if first <= port <= last and not in_list(port, reserved)]
    if taken:
        listed = ",".join([*filter(None, [reserved]), *map(str, taken)])
        yield warning(
            "reserved-ports",
            f"port {', '.join(map(str, taken))} is among those for outgoing connections ({first}-{last})",
            "one of them may have it when the relay wants to start",
            set_sysctl("net.ipv4.ip_local_reserved_ports", listed),
        )
    wanted = max(MIN_PORTS, min(case.settings.max_connections or 0, 28000))
    if last - first + 1 < wanted and case.settings.preserve_source != "full":
        yield problem(
            "port-range",
            f"outgoing connections have {last - first + 1} ports only",
            f"each connection to one server takes one: with less than {wanted} the relay runs out (no-local-port)",
            set_sysctl("net.ipv4.ip_local_port_range", USUAL_PORTS),
        )
    else:
        yield ok("port-range", f"{last - first + 1} ports for outgoing connections")


def probe_descriptors(case: Case) -> Iterator[Finding]:
    """Two descriptors a connection, of the worker that has it (limits.py)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    listening = len(case.settings.ports) * len(case.settings.bind)
    room = limits.of_relay(None, hard, listening, case.workers, limits.usable_memory()).most
    wanted = case.settings.max_connections
    if wanted is None or wanted <= room:
        yield ok("descriptors", f"descriptors for {room} connections")
        return
    needed = -(-wanted // case.workers) * limits.DESCRIPTORS_EACH + limits.RESERVED_DESCRIPTORS + listening
    raised = host.number("fs.nr_open") or 0
    lift = f"{set_sysctl('fs.nr_open', needed)} && " if raised < needed else ""
    yield problem(
        "descriptors",
        f"max-connections is {wanted}, and {case.workers} x {hard} open files are enough for {room}",
        f"the rest waits in the backlog; in a unit set LimitNOFILE={needed}",
        f"{lift}ulimit -n {needed} && {case.command()}",
    )


def probe_threads(case: Case) -> Iterator[Finding]:
    """Two threads a connection: the kernel's number, the account's, the group's, and the maps that stacks take."""
    wanted = case.settings.max_connections
    room, what, remedy = min(_thread_limits(case), key=lambda limit: limit[0])
    if wanted is None or wanted <= room:
        yield ok("threads", f"threads for {room} connections")
        return
    remedy = remedy.format(threads=wanted * THREADS_EACH + OTHER_THREADS, maps=maps_for(wanted))
    yield problem(
        "threads",
        f"max-connections is {wanted}, and {what} is enough for {room}",
        "the rest waits in the backlog",
        remedy or case.command(max_connections=room),
    )


def probe_memory(case: Case) -> Iterator[Finding]:
    """What connections take while they rest, against what there is."""
    settings, each = case.settings, limits.MEMORY_EACH // 1024
    memory = limits.usable_memory()
    room = memory // limits.MEMORY_EACH
    wanted = settings.max_connections
    has = f"memory for {room} connections at rest ({memory >> 20} MiB, {each} KiB each)"
    if wanted is None or wanted <= room:
        yield ok("memory", f"{has}; max-connections = {wanted or 'auto'}")
        return
    yield warning(
        "memory",
        f"{has}, and max-connections is {wanted}",
        "with more of them the kernel kills a worker, and its connections are reset",
        case.command(max_connections=room),
    )


def probe_backlog(case: Case) -> Iterator[Finding]:
    """How many clients may wait for accept()."""
    most = host.number("net.core.somaxconn")
    if most is not None and most < BACKLOG:
        yield warning(
            "somaxconn",
            f"net.core.somaxconn is {most}",
            f"only so many new connections may wait at a time, where the relay asks for {BACKLOG}; others are dropped",
            set_sysctl("net.core.somaxconn", BACKLOG),
        )
    else:
        yield ok("somaxconn", f"{most} connections may wait")
    if host.number("net.ipv4.tcp_abort_on_overflow") == 1:
        yield warning(
            "abort-on-overflow",
            "net.ipv4.tcp_abort_on_overflow is 1",
            "past max-connections clients are reset, where they should wait",
            set_sysctl("net.ipv4.tcp_abort_on_overflow", 0),
        )


def probe_conntrack(case: Case) -> Iterator[Finding]:
    """The table of connections, where the ruleset or somebody else uses it. A full one drops every new connection."""
    most, now = host.number("net.netfilter.nf_conntrack_max"), host.number("net.netfilter.nf_conntrack_count")
    if not most or now is None:
        return
    remedy = set_sysctl("net.netfilter.nf_conntrack_max", max(2 * most, 4 * (case.settings.max_connections or 0)))
    if now * 10 >= most * 9:
        why = "when it is full, the kernel drops new connections"
        yield problem("conntrack", f"the conntrack table is nearly full ({now} of {most})", why, remedy)
    elif 2 * (case.settings.max_connections or 0) > most:
        yield warning(
            "conntrack",
            f"the conntrack table holds {most} connections, and max-connections is {case.settings.max_connections}",
            "a relayed connection takes two places in it",
            remedy,
        )
    else:
        yield ok("conntrack", f"conntrack has {now} of {most}")


def maps_for(connections: int) -> int:
    """Memory maps of a process with so many connections."""
    return connections * THREADS_EACH * MAPS_EACH + OTHER_MAPS


def in_list(port: int, ranges: str) -> bool:
    """True if the port is in a list such as `15002,20000-20010`."""
    for item in filter(None, ranges.split(",")):
        first, _, last = item.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False


def _thread_limits(case: Case) -> Iterator[tuple[int, str, str]]:
    """How many connections each limit is enough for, its name, and the command that lifts it; '' if none does."""
    for name in ("kernel.threads-max", "kernel.pid_max"):
        value = host.number(name)
        if value:
            yield _pairs(value), f"{name}={value}", f"sysctl -w {name}={{threads}}"
    maps = host.number("vm.max_map_count")
    if maps:
        room = max(0, (maps - OTHER_MAPS) // (THREADS_EACH * MAPS_EACH)) * case.workers
        yield room, f"vm.max_map_count={maps}", "sysctl -w vm.max_map_count={maps}"
    _, processes = resource.getrlimit(resource.RLIMIT_NPROC)
    # It does not hold for root, but for an account that root has become.
    if processes != resource.RLIM_INFINITY and (os.geteuid() or case.settings.user):
        yield _pairs(processes), f"the limit of {processes} processes (ulimit -u)", ""
    group = cgroup.least("pids", "pids.max")
    if group is not None:
        yield _pairs(group), f"pids.max={group} of this control group", ""


def _pairs(threads: int) -> int:
    return max(0, (threads - OTHER_THREADS) // THREADS_EACH)


def _try_to_bind(address: Endpoint, interface: str | None) -> OSError | None:
    """Listen as the relay would, and let go at once. None if that works, or if there is no such family here."""
    try:
        with listeners.bound(address, interface) as sock:
            sock.listen(1)
    except OSError as error:
        absent = address.host in ("::", "::1") and error.errno == errno.EADDRNOTAVAIL
        return None if absent or error.errno == errno.EAFNOSUPPORT else error
    return None


def _about_refusal(case: Case, address: Endpoint, error: OSError) -> Iterator[Finding]:
    if error.errno == errno.EADDRINUSE:
        sockets = [one for one in proc_net.tcp_sockets() if one.listening and one.local_port == address.port]
        owners = [found for one in sockets if (found := host.owner(one.inode))]
        if owners and all(map(is_relay, owners)):
            yield ok("ports", f"{address} is the running relay's")
            return
        whose = f"process {owners[0][0]} ({owners[0][1][:60]})" if owners else "another process"
        yield problem(
            "ports", f"{address} is taken by {whose}", "the relay cannot listen there", _other_port(case, address)
        )
    elif error.errno == errno.EADDRNOTAVAIL:
        yield problem(
            "bind",
            f"{address.host} is no address of this host",
            "the relay cannot listen there",
            case.command(bind=("0.0.0.0", "::")),
        )
    elif error.errno == errno.ENODEV:
        names = [one.name for one in case.host.interfaces if one.name != "lo"]
        yield problem(
            "interface",
            f"there is no interface {case.settings.interface} (there are {', '.join(names)})",
            "nothing comes in by it, so nothing inbound is relayed",
            case.command(interface=None),
        )
    elif error.errno == errno.EACCES and address.port < (host.number(UNPRIVILEGED) or 0):
        yield problem(
            "ports",
            f"this account may not listen on port {address.port}",
            f"ports below {host.sysctl(UNPRIVILEGED)} take CAP_NET_BIND_SERVICE",
            set_sysctl(UNPRIVILEGED, address.port),
        )
    else:
        yield problem("ports", f"cannot listen on {address} ({error.strerror})", "nor will the relay", case.command())


def _other_port(case: Case, address: Endpoint) -> str:
    """The same with the next free port in the place of this one."""
    settings = case.settings
    used = {one.local_port for one in proc_net.tcp_sockets()} | set(settings.ports)
    ranges = (*settings.intercept_inbound, *settings.intercept_outbound)
    free = next(
        port
        for port in (*range(address.port + 1, 65536), *range(1024, address.port))
        if port not in used and not any(one.first <= port <= one.last for one in ranges)
    )
    changes: dict[str, Any] = {"ports": tuple(free if port == address.port else port for port in settings.ports)}
    if settings.inbound_port == address.port:
        changes["inbound_port"] = free
    if settings.outbound_port == address.port:
        changes["outbound_port"] = free
    return case.command(**changes)
