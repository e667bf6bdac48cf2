"""The interception rules of the lab, as text: nft for the packets, ip for the routes.

Small and of the lab's own; it knows the lab's two interfaces and nothing of other hosts. Three bits of the
fwmark say what a packet is, and no rule touches the other bits:

    IN      of an intercepted connection from outside; or answers to a relay that borrowed a client's address
    OUT     of an intercepted connection of a program here; or such answers from a server on this host
    RELAY   sent by the relay itself (SO_MARK): never intercepted

Only bare SYNs are intercepted, so that connections older than the rules live on. Other packets of ours are
known by their transparent socket. Bare SYNs must not be: they would find an old connection in TIME_WAIT.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Topology = Literal["gateway", "host", "local"]
"""gateway: client to server, forwarded by the relay's host. host: client to a server program on the relay's
host. local: a program on the relay's host to the server."""

TABLE = "tproxy_relay_lab"

_BARE_SYN = "tcp flags & (fin | syn | rst | ack) == syn"
_NOT_BARE_SYN = "tcp flags & (fin | syn | rst | ack) != syn"


@dataclass(frozen=True)
class Plan:
    """What to intercept and where to."""

    topology: Topology = "gateway"
    ports: tuple[int | str, ...] = ("8000-8999",)
    """Destination ports, or ranges of them as `low-high`."""
    preserve_source: bool = False
    """True if the relay connects from its clients' addresses: the answers must find their way back to it."""
    inbound_port: int = 15006
    outbound_port: int = 15002
    client_interface: str = "rc"
    server_interface: str = "rs"
    mark_mask: int = 0x07000000
    route_table: int = 7006
    route_priority: int = 7006

    @property
    def inbound_mark(self) -> int:
        """IN, the lowest bit of the mask."""
        return _bits(self.mark_mask)[0]

    @property
    def outbound_mark(self) -> int:
        """OUT, the middle bit."""
        return _bits(self.mark_mask)[1]

    @property
    def relay_mark(self) -> int:
        """RELAY, the highest bit."""
        return _bits(self.mark_mask)[2]


def nft(plan: Plan) -> str:
    """The nft script; loading it twice is the same as once."""
    chains = [*_prerouting(plan), *_from_lo(plan), *_output(plan)]
    return nft_undo() + "\n".join([f"table inet {TABLE} {{", *chains, "}", ""])


def nft_undo() -> str:
    """The nft script that leaves nothing, whether or not there was anything."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def routes(plan: Plan) -> list[str]:
    """The commands of `ip`, for each family: a table that delivers everything here, and who looks there.

    The rules are bound to the interface that a packet came in by. A rule for the mark alone would match in
    the kernel's source check too (src_valid_mark) and for our own SYN-ACKs (tcp_fwmark_accept): all lost.
    """
    inbound, outbound = f"{plan.inbound_mark:#x}", f"{plan.outbound_mark:#x}"
    arrivals = []
    if plan.topology != "local":
        arrivals.append((inbound, plan.client_interface))
    if plan.topology == "gateway" and plan.preserve_source:
        arrivals.append((inbound, plan.server_interface))
    if plan.topology == "local" or (plan.topology == "host" and plan.preserve_source):
        arrivals.append((outbound, "lo"))
    lookup = f"lookup {plan.route_table}"
    return [f"route add local default dev lo table {plan.route_table}"] + [
        f"rule add pref {plan.route_priority} fwmark {mark}/{plan.mark_mask:#x} iif {name} {lookup}"
        for mark, name in arrivals
    ]


def _prerouting(plan: Plan) -> list[str]:
    steer = f"{_BARE_SYN} tcp dport {_ports(plan.ports)} tproxy to :{plan.inbound_port}"
    mark = _set(plan, "meta mark", plan.inbound_mark)
    body = [
        "type filter hook prerouting priority mangle; policy accept;",
        "meta l4proto != tcp return",
        'iifname "lo" goto from_lo',
        f"{_NOT_BARE_SYN} socket transparent 1 {mark} accept",
    ]
    if plan.topology != "local":
        body.append(f'iifname "{plan.client_interface}" {steer} {mark} counter accept')
    return _chain("prerouting", body)


def _from_lo(plan: Plan) -> list[str]:
    ours, to_us = _is(plan, "meta mark", plan.relay_mark), _is(plan, "meta mark", plan.outbound_mark)
    return _chain(
        "from_lo",
        [
            f"{ours} ct direction original {_set(plan, 'ct mark', plan.relay_mark)} accept",
            f"{ours} accept",
            f"{to_us} meta l4proto tcp tproxy to :{plan.outbound_port} accept",
        ],
    )


def _output(plan: Plan) -> list[str]:
    """TPROXY does not exist in output: mark there, be routed to lo, and TPROXY when it comes in from lo."""
    divert = _set(plan, "meta mark", plan.outbound_mark)
    body = [
        "type route hook output priority mangle; policy accept;",
        "meta l4proto != tcp return",
        # First, because with tcp_fwmark_accept=1 the server's own answers carry RELAY too.
        f"ct direction reply {_is(plan, 'ct mark', plan.relay_mark)} {divert} accept",
        f"{_is(plan, 'meta mark', plan.relay_mark)} return",
        "fib daddr type local return",
    ]
    if plan.topology == "local":
        remember = _set(plan, "ct mark", plan.outbound_mark)
        body += [
            f"ct direction original {_is(plan, 'ct mark', plan.outbound_mark)} {divert} accept",
            f"{_BARE_SYN} tcp dport {_ports(plan.ports)} {remember} {divert} counter",
        ]
    return _chain("output", body)


def _chain(name: str, body: Sequence[str]) -> list[str]:
    return [f"  chain {name} {{", *(f"    {line}" for line in body), "  }"]


def _set(plan: Plan, what: str, bits: int) -> str:
    return f"{what} set {what} & {0xFFFFFFFF & ~plan.mark_mask:#010x} | {bits:#010x}"


def _is(plan: Plan, what: str, bits: int) -> str:
    return f"{what} & {plan.mark_mask:#010x} == {bits:#010x}"


def _ports(ports: Sequence[int | str]) -> str:
    return "{ " + ", ".join(str(port) for port in ports) + " }"


def _bits(mask: int) -> list[int]:
    bits = [1 << position for position in range(32) if mask & 1 << position]
    if len(bits) != 3:
        raise ValueError(f"the mark mask {mask:#x} has {len(bits)} bits, not three")
    return bits
