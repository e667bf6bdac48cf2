"""A real connection through the rules of this host, while a relay runs.

Two throw-away namespaces are tied to this host for a moment, a client's and a server's, each by a veth pair with
addresses for documentation (RFC 5737, RFC 3849). The client's connection to the server comes in as a stranger's
would; one that this process makes goes out as a program's would. The server shows whether it arrived, and the table of
sockets whether the relay took it. No packet leaves this host, and the namespaces take all of it with them.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from tproxy_relay.check import firewall, host
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import PROBLEM, WARNING, Finding, ok, problem, warning
from tproxy_relay.check.firewall import Packet
from tproxy_relay.check.namespace import Namespace
from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs, ruleset
from tproxy_relay.intercept.plan import Family
from tproxy_relay.net import probe_networks, proc_net, unix_sockets

CONNECT_TIMEOUT = 0.8
"""Seconds for a connection within this host, which takes a millisecond."""

TURN_TIMEOUT = 15.0
"""Seconds for others to finish, who take one, and some more for what gets no answer."""
ANSWER_TIMEOUT = 0.5
"""Seconds for one who has just taken the name to listen."""
_TURN = "tproxy_relay/self-probe"
"""The abstract name (unix(7)) that whoever tries has in this network namespace."""

NAME = "self-probe"
_PERHAPS = {"lost-marks", "tracking", "filter", "other-proxy"}
"""The names of warnings that may explain why a connection does not get through."""

CLIENT_LINK, SERVER_LINK = "tprchk0", "tprchk1"
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}

WORKS, DIRECT, REFUSED, LOST, STUCK, TURNED_AWAY = "works", "direct", "refused", "lost", "stuck", "turned away"

_MEANING = {
    DIRECT: ("goes direct", "the ruleset does not take it to the relay"),
    REFUSED: ("is refused", "neither relay nor server answers"),
    LOST: ("is lost", "no answer: it is taken by the rules, or dropped by a filter, and reaches nobody"),
    STUCK: ("is taken by the relay and goes no further", "the relay hangs, or cannot connect"),
    TURNED_AWAY: ("is taken by the relay and reset", "it cannot connect, or its own connection is taken again"),
}


class Address(NamedTuple):
    """Of one end, with this host's address on the same link."""

    far: str
    near: str
    length: int


def probe_connections(case: Case) -> Iterator[Finding]:
    """Each direction that is intercepted, by each family."""
    if not case.intercepts or not case.relay_listens or ruleset.status(case.plan).state == "absent":
        return
    yield from try_connections(case)


def try_connections(case: Case) -> Iterator[Finding]:
    """The same for a relay that is known to be there, with its rules."""
    if not case.host.may(host.NET_ADMIN):
        yield warning(NAME, "no connection was tried", "that takes root", f"sudo {case.command()}")
        return
    if case.settings.target is not None:
        yield ok(NAME, f"no connection was tried: all of them would go to the target {case.settings.target}")
        return
    user = not case.host.may(host.SYS_ADMIN)
    try:
        with _alone(), Namespace(user=user) as client, Namespace(user=user) as server:
            with _wired(case, client, server) as families:
                yield from _try_all(case, client, server, families)
    except (RelayError, OSError) as error:
        yield warning(NAME, f"no connection was tried ({error})", "so nobody knows whether they are relayed")


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """The links and the addresses are there once: a relay and a person may both want to try. RelayError if that takes
    too long."""
    deadline = time.monotonic() + TURN_TIMEOUT
    silent_until = min(deadline, time.monotonic() + ANSWER_TIMEOUT)
    with socket.socket(socket.AF_UNIX) as turn:
        while True:
            try:
                turn.bind(unix_sockets.abstract(_TURN))
                turn.listen()
                break
            except OSError as error:
                trusted = _await_holder(deadline)
                if trusted is False or (trusted is None and time.monotonic() > silent_until):
                    break  # any account may take the name: who does keeps nobody from trying
                if time.monotonic() > deadline:
                    raise RelayError("somebody else tries connections all the time") from error
                time.sleep(0.02)
        yield


def _await_holder(deadline: float) -> bool | None:
    """Whether the holder of the name may have it; if so, wait until it is given back. None if there is no telling: it
    has just been taken, or given back, or its holder does not answer."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            asking.connect(unix_sockets.abstract(_TURN))
            if not unix_sockets.is_trusted(unix_sockets.peer(asking).uid):
                return False
        except OSError:
            return None
        with contextlib.suppress(OSError):
            asking.recv(1)  # ends with the holder
        return True


def _try_all(case: Case, client: Namespace, server: Namespace, families: list[Family]) -> Iterator[Finding]:
    plan = case.plan
    for direction, ranges in (("inbound", plan.inbound), ("outbound", plan.outbound)):
        if not ranges:
            continue
        if direction == "inbound" and plan.interface:
            yield ok(NAME, f"inbound was not tried: it is limited to interface {plan.interface}")
            continue
        if direction == "outbound" and plan.exempt_uid == os.geteuid():
            yield ok(NAME, "outbound was not tried: this account is exempt")
            continue
        for family in families:
            taken_at = ranges[0].first if plan.mode == "tproxy" else getattr(plan, f"{direction}_port")
            maker = client if direction == "inbound" else None
            result = attempt(maker, server, family, address(case, family, 1).far, ranges[0].first, taken_at)
            what = f"{direction} IPv{family} connection to port {ranges[0].first}"
            unsure = result in (LOST, REFUSED, STUCK) and next(_by_interface(case, family, direction), None)
            yield _untold(what, result, unsure) if unsure else _judged(case, what, result)


def _by_interface(case: Case, family: Family, direction: str) -> Iterator[str]:
    """The filters that do not let in, or out, for certain what is tried, and may do so for others, by the interface."""
    plan = case.plan
    ports = (plan.inbound if direction == "inbound" else plan.outbound)[0]
    leaving = Packet(family, ports.first, plan.marks.relay, plan.mark_mask, None, None)
    ways = [("output", leaving, leaving._replace(oif=SERVER_LINK))]
    if direction == "inbound":
        arriving = leaving._replace(mark=plan.marks.inbound)
        if plan.mode == "redirect":
            arriving = arriving._replace(mark=0, port=plan.inbound_port)
        ways = [(hook, arriving, arriving._replace(iif=CLIENT_LINK)) for hook in ("prerouting", "input")] + ways
    for hook, anybodys, ours in ways:
        for chain, table in firewall.base_chains(case.firewall, hook, "filter", family):
            if firewall.verdict(chain, table, ours)[0] == firewall.ACCEPT:
                continue
            if firewall.verdict(chain, table, anybodys)[0] != firewall.DROP and any(
                condition.kind in ("iif", "oif") and condition.holds(anybodys) is None
                for rule, _ in firewall.met(chain, table, anybodys)
                for condition in rule.conditions
            ):
                yield chain.title


def _untold(what: str, result: str, where: str) -> Finding:
    word = "out or in" if result == STUCK else "in"
    return warning(
        NAME,
        f"an {what} {_MEANING[result][0]}: whether others are relayed cannot be told by a trial",
        f"{where} lets {word} by interface, and what is tried has one of its own",
    )


def _judged(case: Case, what: str, result: str) -> Finding:
    if result == WORKS:
        return ok(NAME, f"an {what} is relayed")
    if result == TURNED_AWAY and _refuses_some(case):
        return ok(NAME, f"an {what} comes to the relay, whose settings refuse it")
    meaning, why = _MEANING[result]
    return problem(NAME, f"an {what} {meaning}", why, _again(case))


def _refuses_some(case: Case) -> bool:
    """True if a connection that is reset may be one that the relay does not want."""
    one = case.settings
    return bool(one.allow or one.deny or one.max_per_source or one.max_rate_per_source)


def _again(case: Case) -> str:
    """Have the relay begin anew, with its connections living on; the rules of nobody are put back."""
    return f"kill -HUP {case.holder}" if case.holder else case.command("rules apply")


def likelier(cause: Finding | None, found: Finding) -> Finding | None:
    """What may be why a connection does not get through: the first problem that others have found, or else the first
    warning of something that takes or drops some packets."""
    if found.name == NAME or (cause is not None and cause.level == PROBLEM):
        return cause
    if found.level == PROBLEM:
        return found
    return cause or (found if found.level == WARNING and found.name in _PERHAPS else None)


def explained(found: Finding, cause: Finding | None) -> Finding:
    """A finding of this probe beside what may be the cause of it, which is then what is to be mended."""
    if found.name != NAME or found.level != PROBLEM or cause is None:
        return found
    return replace(found, why=cause.what, remedy=cause.remedy or found.remedy)


def attempt(
    client: Namespace | None, server: Namespace, family: Family, destination: str, port: int, taken_at: int
) -> str:
    """Connect and see what becomes of it; without a client's namespace, from this host."""
    kind = _FAMILIES[family]
    with server.socket(kind) as listener, client.socket(kind) if client else socket.socket(kind) as sock:
        # Both directions may begin with the same port, and what came there before is still closing.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((destination, port))
        listener.listen(1)
        for each in (listener, sock):
            each.settimeout(CONNECT_TIMEOUT)
        try:
            sock.connect((destination, port))
        except ConnectionRefusedError:
            return REFUSED
        except ConnectionError:
            return TURNED_AWAY  # it was connected for a moment
        except OSError:
            return LOST
        mine = sock.getsockname()[1]
        if any((one.local_port, one.remote_port) == (taken_at, mine) for one in proc_net.tcp_sockets()):
            return WORKS if _passes(sock, listener) else TURNED_AWAY if _was_reset(sock) else STUCK
        return TURNED_AWAY if _was_reset(sock) else DIRECT


def _was_reset(sock: socket.socket) -> bool:
    """True if somebody has taken the connection and did not want it: the relay has, as the server here wants all."""
    try:
        sock.setblocking(False)
        return not sock.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _passes(sock: socket.socket, listener: socket.socket) -> bool:
    """True if what the client says comes to the server, and the answer back."""
    try:
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(CONNECT_TIMEOUT)
            sock.sendall(b"?")
            accepted.sendall(b"!" if accepted.recv(1) == b"?" else b"-")
            return sock.recv(1) == b"!"
    except OSError:
        return False


@contextlib.contextmanager
def _wired(case: Case, client: Namespace, server: Namespace) -> Iterator[list[Family]]:
    """Tie both to this host. The families that this works with."""
    ends = ((client, CLIENT_LINK), (server, SERVER_LINK))
    try:
        _ip(*(line for namespace, link in ends for line in _link(link, namespace.pid)))
        near = (line for number, (_, link) in enumerate(ends) for line in _addresses(case, number, link))
        _ip(*near, force=True)
        for number, (namespace, _) in enumerate(ends):
            far = (line for family in case.plan.families for line in _far(address(case, family, number), family))
            namespace.run(["ip", "-force", "-batch", "-"], "\n".join([*_FAR_LINK, *far, ""]), check=False)
        families = [family for family in case.plan.families if _is_ours(address(case, family, 1).near, family)]
        if not families:
            raise RelayError("no addresses for it")
        yield families
    finally:
        _ip(*(f"link del {link}" for _, link in ends), force=True)
        _await_gone()


_FAR_LINK = ("link set lo up", "link set far addrgenmode none", "link set far up")


def _link(name: str, to: int) -> Iterator[str]:
    yield f"link add {name} type veth peer name far netns {to}"
    yield from (f"link set {name} addrgenmode none", f"link set {name} up")


def _addresses(case: Case, number: int, link: str) -> Iterator[str]:
    for family in case.plan.families:
        one = address(case, family, number)
        if family == 6:  # neighbours are asked from an address of the link
            yield f"addr add fe80::1/64 dev {link} nodad"
        yield f"addr add {one.near}/{one.length} dev {link}{' nodad' if family == 6 else ''}"


def _far(one: Address, family: Family) -> Iterator[str]:
    if family == 6:
        yield "addr add fe80::2/64 dev far nodad"
    yield f"addr add {one.far}/{one.length} dev far{' nodad' if family == 6 else ''}"
    yield f"route add default via {one.near}"


def _is_ours(near: str, family: Family) -> bool:
    """True if this host has the address: it has none of a family that is switched off."""
    with socket.socket(_FAMILIES[family]) as sock:
        try:
            sock.bind((near, 0))
        except OSError:
            return False
    return True


def address(case: Case, family: Family, number: int) -> Address:
    """Of the client's link (0) or the server's (1)."""
    if family == 6:
        return Address(f"{probe_networks.IPV6}:{number}::2", f"{probe_networks.IPV6}:{number}::1", 64)
    used = [one for interface in case.host.interfaces for one in interface.addresses]
    used += [str(route.get("dst")) for route in case.host.routes(4, "main")]
    free = (one for one in probe_networks.IPV4 if not any(word.startswith(f"{one}.") for word in used))
    network = next(free, probe_networks.IPV4[0])
    return Address(f"{network}.{4 * number + 2}", f"{network}.{4 * number + 1}", 30)


def _ip(*lines: str, force: bool = False) -> None:
    """With `force` a line that fails is passed over."""
    options = ["-force"] if force else []
    programs.run(["ip", *options, "-batch", "-"], "\n".join([*lines, ""]), check=not force)


def _await_gone() -> None:
    """The relay's last packets for the far ends must not find another way out of this host."""
    deadline = time.monotonic() + CONNECT_TIMEOUT
    while time.monotonic() < deadline and os.path.exists(f"/proc/sys/net/ipv4/conf/{SERVER_LINK}"):
        continue
