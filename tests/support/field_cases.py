"""The cases of the field: what changes on hosts and networks under connections, for a table of direct and relayed ones.

A case is the same with a relay and without. What each of them is, and that it is so, is tested one by one elsewhere.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import flush_trials
import half_open
import unreachable_trials
from host_change_trials import plug, switch_ipv6, unplug
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, ways
from neighbour_cases import BY_NFT, TAILSCALE, by_iptables, docker
from neighbour_trials import Neighbour, spoil
from routers import routers
from transfer_trials import Transfer, transfer, transfer_servers

from tproxy_relay.lab import Lab
from tproxy_relay.net.endpoint import from_sockaddr

Happen = Callable[[Lab], AbstractContextManager[object]]
Trial = Callable[[Lab, int], Transfer]
"""A new connection of that family, and what the client saw of it."""
Family = Literal["v4", "v6"]

TRY_TIMEOUT = 4.0
"""Seconds for a connection: SYNs go out after none, one and three."""
PROBING_TIMEOUT = 30.0
"""The kernel begins to probe a path after 6.5 seconds of silence (tcp_retries1)."""
FLOOD = 6_000
INBOUND = ("--intercept-inbound", str(PORT))
KEEPS = ("--preserve-source", "address")
COOKIES = "net.ipv4.tcp_syncookies"
PROBING = "net.ipv4.tcp_mtu_probing"
TOLD_BY_NUMBERS = "it hangs on an interface, so only numbers tell: after ten lost clients `status` names it"
EARLY = "the relay accepts before it connects: what connect() is told directly comes as a reset, as soon"


@dataclass(frozen=True)
class Case:
    """What happens, to whom, and how it is tried."""

    name: str
    options: tuple[str, ...]
    """Of the relay."""
    trial: Trial
    before: Happen
    """What there is when the relay starts; servers, too."""
    after: Happen
    """What happens then, before the trial."""
    families: tuple[Family, ...] = ("v4", "v6")
    backends: tuple[str, ...] = BACKENDS
    relayed: str = ""
    """What clients of a relay see where it cannot be as directly."""
    reason: str = ""
    """And why."""


def down(way: str, patience: float = TRY_TIMEOUT) -> Trial:
    """300,000 bytes from the server."""
    return lambda lab, family: transfer(*ways(lab)[way], family, "down", patience)


def up(way: str) -> Trial:
    """300,000 bytes from the client."""
    return lambda lab, family: transfer(*ways(lab)[way], family, "up", TRY_TIMEOUT)


def served(*more: Callable[[Lab], object], at_relay: bool = False) -> Happen:
    """Servers, and what is done once on the way."""

    @contextlib.contextmanager
    def happen(lab: Lab) -> Iterator[None]:
        with transfer_servers(lab.relay if at_relay else lab.server):
            for one in more:
                one(lab)
            yield

    return happen


def done(*what: Callable[[Lab], object]) -> Happen:
    """These, once."""

    @contextlib.contextmanager
    def happen(lab: Lab) -> Iterator[None]:
        for one in what:
            one(lab)
        yield

    return happen


NOTHING = done()


# --- packets that are no TCP segments


def narrow(which: int, *, silent: bool = False) -> Happen:
    """A path with a smaller MTU to the client (0) or to the server (1)."""

    @contextlib.contextmanager
    def happen(lab: Lab) -> Iterator[None]:
        with routers(lab) as pair, transfer_servers(lab.server):
            pair[which].narrow()
            pair[which].keep_silent(silent)
            for host in lab.hosts:
                host.set_sysctl(PROBING, int(silent))
            yield

    return happen


@contextlib.contextmanager
def refusing(lab: Lab) -> Iterator[None]:
    """A router before the server that refuses some ports."""
    with routers(lab) as pair:
        unreachable_trials.refuse(pair[1].host)
        yield


def unreachable(kind: str) -> Trial:
    """Connect to where one is told so."""

    def trial(lab: Lab, family: int) -> Transfer:
        answer = unreachable_trials.ask(lab.client, lab.server.address(family), unreachable_trials.PORTS[kind], 8.0)
        return Transfer(answer.client, answer.saw, answer.seconds)

    return trial


# --- handshakes


def cookies(lab: Lab) -> None:
    """Of the relay's host, always; namespaces of one kernel share their secret, so the server makes none."""
    lab.server.set_sysctl(COOKIES, 0)
    lab.relay.set_sysctl(COOKIES, 2)


def flood(lab: Lab) -> None:
    """Half-open connections to the server, whoever answers them."""
    for family in FAMILIES.values():
        half_open.half_open(lab, lab.server.address(family), FLOOD)


# --- the host changes


def unplug_and_plug(lab: Lab) -> None:
    """The interface is made again."""
    unplug(lab)
    plug(lab)


def spoilt(neighbour: Neighbour) -> Happen:
    """By another program."""
    return done(functools.partial(_spoil, how=neighbour.how))


def _spoil(lab: Lab, how: tuple[str, ...]) -> None:
    spoil(lab, how)


def published(lab: Lab, family: int) -> Transfer:
    """A connection to the relay's host, whose port is a container's."""
    return transfer(lab.client, lab.relay, family, "down", TRY_TIMEOUT)


def flushed(way: str, first: str) -> Trial:
    """A live connection, before and after conntrack's table is emptied; `first` sends then."""

    def trial(lab: Lab, family: int) -> Transfer:
        began = time.monotonic()
        ends = flush_trials.live_connection(lab, way, family)
        client = str(from_sockaddr(ends[0].getsockname()))
        try:
            return Transfer(client, flush_trials.after_flush(lab, ends, first), time.monotonic() - began)
        finally:
            flush_trials.close(ends)

    return trial


def neighbours() -> Iterator[Case]:
    """What others do later, by nft and by either iptables."""
    # Where a proxy takes what programs send, there is nothing that would be direct.
    named = [(one, "nft", ("nft",)) for one in BY_NFT if one.finding != "other-proxy"]
    named += [(one, program, BACKENDS) for program in BACKENDS[1:] for one in by_iptables(program)]
    for one, program, backends in named:
        options = (*(INBOUND if INBOUND[0] in one.options else BOTH_WAYS), *_without(INBOUND, one.options))
        way = one.harms[-1]
        yield Case(
            f"{program}: {one.name} ({way})",
            options,
            down(way),
            served(at_relay=way == "host"),
            spoilt(one),
            backends=backends,
            relayed="no answer" if one.level == "warning" else "",
            reason=TOLD_BY_NUMBERS if one.level == "warning" else "",
        )


def _without(some: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(one for one in options if one not in some)


CASES = (
    Case("a path to the client with an MTU of 1,400", INBOUND, down("gateway"), narrow(0), NOTHING),
    Case(
        "the same, nobody tells of it",
        INBOUND,
        down("gateway", PROBING_TIMEOUT),
        narrow(0, silent=True),
        NOTHING,
    ),
    Case("a path to the server with an MTU of 1,400", INBOUND, up("gateway"), narrow(1), NOTHING),
    Case("the same, preserve-source", (*INBOUND, *KEEPS), up("gateway"), narrow(1), NOTHING),
    Case("the same, preserve-source full", (*INBOUND, "--preserve-source", "full"), up("gateway"), narrow(1), NOTHING),
    Case("the same, of a program here", BOTH_WAYS, up("local"), narrow(1), NOTHING),
    *(
        Case(
            f"a router says of the server: {kind}",
            (f"--intercept-inbound={PORT}-{PORT + 20}", *KEEPS),
            unreachable(kind),
            refusing,
            NOTHING,
            relayed="connected, ECONNRESET",
            reason=EARLY,
        )
        for kind in ("net", "host", "port", "prohibited")
    ),
    Case("SYN cookies", INBOUND, down("gateway"), served(cookies), NOTHING),
    Case("6,000 half-open connections", INBOUND, down("gateway"), served(half_open.lead_to_nobody), done(flood)),
    Case(
        "the interface is deleted and made again",
        (*INBOUND, "--interface", "rc"),
        down("gateway"),
        served(),
        done(unplug_and_plug),
    ),
    Case(
        "the same, on-failure closed",
        (*INBOUND, "--interface", "rc", "--on-failure", "closed"),
        down("gateway"),
        served(),
        done(unplug_and_plug),
    ),
    Case(
        "the interface comes after the relay",
        (*INBOUND, "--interface", "rc"),
        down("gateway"),
        served(unplug),
        done(plug),
    ),
    Case(
        "IPv6 comes after the relay",
        BOTH_WAYS,
        down("gateway"),
        served(functools.partial(switch_ipv6, on=False)),
        done(functools.partial(switch_ipv6, on=True)),
        families=("v6",),
    ),
    *(
        Case(f"a rule of routing that catches everything ({way})", BOTH_WAYS, down(way), served(), done(happen))
        for way in ("gateway", "local")
        for happen in [functools.partial(_spoil, how=TAILSCALE)]
    ),
    *(
        Case(
            f"a port is published by {program}",
            INBOUND,
            published,
            served(),
            done(functools.partial(_spoil, how=docker(program))),
        )
        for program in BACKENDS
    ),
    *neighbours(),
    Case("conntrack -F, inbound", INBOUND, flushed("gateway", "client"), NOTHING, NOTHING),
    Case("conntrack -F, of a program here; the server sends", BOTH_WAYS, flushed("local", "server"), NOTHING, NOTHING),
    Case(
        "conntrack -F, of a program here; it sends itself",
        BOTH_WAYS,
        flushed("local", "client"),
        NOTHING,
        NOTHING,
        relayed="reset",
        reason="its packet goes to the server, which knows nothing of it",
    ),
    Case(
        "conntrack -F, preserve-source to a server here",
        (*INBOUND, *KEEPS),
        flushed("host", "client"),
        NOTHING,
        NOTHING,
    ),
    Case(
        "conntrack -F, mode redirect",
        (*BOTH_WAYS, "--mode", "redirect"),
        flushed("gateway", "client"),
        NOTHING,
        NOTHING,
        relayed="reset",
        reason="what the addresses were rewritten from stood in that table only",
    ),
)
"""In the order of the table."""
