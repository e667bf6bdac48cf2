"""The plan as nft text: one table of our own, every rule with a comment that says what it is for.

Only bare SYNs are taken, so connections older than the rules live on. Other packets of ours are known by their
transparent socket, or by a connection mark. Bare SYNs must not be known that way: they would find an old
connection in TIME_WAIT, and the client would have to try again.

A handshake that was answered with a SYN cookie (tcp(7), tcp_syncookies) has no socket until it ends: the listener
alone can read the client's ACK. So a listener's SYN-ACK marks the connection in conntrack, and what the client sends
in such a one is offered to its socket or else to the listener. Not the SYN: one that finds the backlog full is sent
again, and may go direct by then. Where nothing is tracked (raw notrack) packets are known by their socket.

ICMP errors about our packets are addressed to whom the relay imitates. They have no socket of their own, and the
kernel's socket match looks up that of the packet which they quote.

TPROXY exists in prerouting only (nft_tproxy.c). So what programs here send is marked in output, which routes it to
lo (routing.py), and meets TPROXY when it comes in from there.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tproxy_relay.intercept.nft_words import NOT_SYN as _NOT_SYN
from tproxy_relay.intercept.nft_words import SYN as _SYN
from tproxy_relay.intercept.nft_words import Rule
from tproxy_relay.intercept.nft_words import is_marked as _is
from tproxy_relay.intercept.nft_words import ports as _ports
from tproxy_relay.intercept.nft_words import set_mark as _set
from tproxy_relay.intercept.plan import CONNTRACK_ZONE, NEVER, Family, Plan, State

TABLE = "tproxy_relay"

_NAMES: dict[Family, str] = {4: "ip", 6: "ip6"}
_SYN_ACK = "tcp flags & (syn | ack) == (syn | ack)"
_ACK = "tcp flags & (syn | rst | ack) == ack"
_ERRORS: dict[Family, str] = {
    4: "icmp type { destination-unreachable, time-exceeded, parameter-problem }",
    6: "icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }",
}
"""What a router or host says of a packet that it did not pass on (RFC 792, RFC 4443). No redirects."""


_TRACKED = Rule("ct state invalid return", "keeps connections tracked")
"""Without any rule that needs it, the kernel stops tracking connections, and addresses are no longer rewritten: the
relayed connections of a draining relay would be lost."""


class Chain(NamedTuple):
    """A chain with its hook, '' for one that is only jumped to."""

    name: str
    hook: str
    rules: tuple[Rule, ...]


def script(plan: Plan, state: State, *, held: bool = False) -> str:
    """The text that installs it in place of what was there. `held`: the kernel removes the table when the process
    that loads this is gone (nft(8), flags owner; Linux 5.12)."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n" + _table(plan, state, held)


def change(plan: Plan, state: State, *, held: bool = False) -> str:
    """The text that brings an installed table into another state, its hooks staying where they are."""
    return f"flush table inet {TABLE}\n" + _table(plan, state, held)


def removal() -> str:
    """The text that leaves nothing, whether or not there was anything."""
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n"


def one_line(text: str) -> str:
    """The same for nft's interactive mode, where a line is a transaction."""
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line if line.endswith(("{", ";")) else f"{line};" for line in lines if line)


def chains(plan: Plan, state: State) -> list[Chain]:
    """The chains of the table for that plan in that state, those without rules left out."""
    return [chain for chain in _all_chains(plan, state) if chain.rules]


def _table(plan: Plan, state: State, held: bool) -> str:
    lines = [f"table inet {TABLE} {{", *(["    flags owner;"] if held else [])]
    for chain in chains(plan, state):
        lines.append(f"    chain {chain.name} {{")
        if chain.hook:
            lines.append(f"        type {chain.hook}; policy accept;")
        lines += [f'        {rule.text} comment "{rule.label}"' for rule in chain.rules]
        lines.append("    }")
    return "\n".join([*lines, "}", ""])


def _all_chains(plan: Plan, state: State) -> Iterator[Chain]:
    tproxy = plan.mode == "tproxy"
    plan_is = f"plan {plan.digest} {state}: TCP only"
    first = Rule("meta l4proto != tcp return", plan_is)
    if plan.preserve_source == "full" and plan.inbound:
        yield Chain("zone_prerouting", "filter hook prerouting priority raw", tuple(_zone_in(plan)))
        yield Chain("zone_output", "filter hook output priority raw", tuple(_zone_out(plan)))
    if plan.needs_routing:
        # Before the chain that goes there: nft takes names in the order of the text.
        yield Chain("from_lo", "", tuple(_from_lo(plan)))
        yield Chain("errors", "", tuple(_errors(plan)))
        yield Chain("answered", "", tuple(_answered(plan, state)))
        prerouting = (_but_errors(plan, "errors", plan_is), *_prerouting(plan, state))
        yield Chain("prerouting", "filter hook prerouting priority mangle", prerouting)
    if plan.imitates or (tproxy and plan.outbound):
        yield Chain("own_errors", "", tuple(_own_errors(plan)))
        output = (_but_errors(plan, "own_errors", plan_is), *_output(plan, state))
        yield Chain("output", "route hook output priority mangle", output)
    if plan.beside_nat:
        yield Chain("nat_keep", "nat hook prerouting priority -101", (first, *_nat_keep(plan)))
    if not tproxy and plan.inbound:
        yield Chain("nat_prerouting", "nat hook prerouting priority -100", (first, *_nat_prerouting(plan, state)))
    if not tproxy and plan.outbound:
        yield Chain("nat_output", "nat hook output priority -100", (first, *_nat_output(plan, state)))


def _prerouting(plan: Plan, state: State) -> Iterator[Rule]:
    take_in = _set(plan, "meta mark", plan.marks.inbound)
    yield Rule('iifname "lo" goto from_lo', "sent by this host to itself")
    takes = plan.mode == "tproxy" and plan.imitates
    if takes:
        # Before the rule that finds listeners of others: a server here has one for the port that the client asks for.
        ours = f"{_is(plan, 'ct mark', plan.marks.inbound)} ct direction original"
        yield Rule(f"{ours} jump answered", "from clients that the relay has answered")
    yield from _not_for_listeners(plan)
    yield Rule(f"{_NOT_SYN} socket transparent 1 {take_in} counter accept", "packets of relayed connections")
    if not takes or state != "active":
        return
    for family in plan.families:
        match = f"{_arrives(plan)}meta nfproto ipv{family} {_SYN} tcp dport {_ports(plan.inbound)}"
        yield Rule(f"{_arrives(plan)}{_never(family)} return", f"never intercepted, IPv{family}")
        yield Rule(f"{match} {_to(plan, family)} {take_in} counter accept", f"inbound, IPv{family}")
        if plan.on_failure == "closed":
            # Reached only while nothing listens: tproxy without a listener lets the packet go on.
            yield Rule(f"{match} counter reject with tcp reset", f"inbound without a relay, IPv{family}")


def _answered(plan: Plan, state: State) -> Iterator[Rule]:
    """What clients send whose SYN was answered: one look finds the socket or else the listener, for a cookie."""
    if plan.mode != "tproxy" or not plan.imitates:
        return
    take_in = _set(plan, "meta mark", plan.marks.inbound)
    for family in plan.families:
        match = f"meta nfproto ipv{family} {_ACK}"
        yield Rule(f"{match} {_to(plan, family)} {take_in} counter accept", f"to its socket or listener, IPv{family}")
        if plan.on_failure == "closed" and state == "active":
            yield Rule(f"{match} counter reject with tcp reset", f"answered by a relay that is gone, IPv{family}")
    # The client did not hear the answer, and this SYN may be left to go direct.
    yield Rule(f"{_SYN} {_set(plan, 'ct mark', 0)}", "has not heard it, and sends its SYN again")


def _to(plan: Plan, family: Family) -> str:
    return f"tproxy {_NAMES[family]} to {_listener(plan, family)}:{plan.inbound_port}"


def _but_errors(plan: Plan, chain: str, label: str) -> Rule:
    """The first rule of a chain that is for TCP, and of the rest for errors at most."""
    return Rule(f"meta l4proto != tcp {f'goto {chain}' if plan.imitates else 'return'}", label)


def _errors(plan: Plan) -> Iterator[Rule]:
    for family in plan.families if plan.imitates else ():
        take_in = _set(plan, "meta mark", plan.marks.inbound)
        match = f'iifname != "lo" {_ERRORS[family]}'
        if plan.on_address(family) is None:
            yield Rule(f"{match} socket wildcard 1 return", f"errors about a port with the number of ours, IPv{family}")
        match = f"{match} socket transparent 1"
        yield Rule(f"{match} {take_in} counter accept", f"errors about packets of the relay, IPv{family}")


def _own_errors(plan: Plan) -> Iterator[Rule]:
    """This host's own, about what the relay sends in the name of others: a neighbour that does not answer, a tunnel."""
    if not plan.imitates:
        return
    divert = _set(plan, "meta mark", plan.marks.outbound)
    label = "errors about packets of the relay"
    related = 'oifname != "lo" ct state related'
    if plan.mode == "tproxy":
        ours = _is(plan, "ct mark", plan.marks.inbound)
        # Both sides of a connection that keeps its port have the same four numbers.
        direction = "" if plan.preserve_source == "full" else "ct direction original "
        yield Rule(f"{related} {ours} {direction}{divert} counter accept", f"{label} to clients")
    if plan.keeps_source:
        ours = _is(plan, "ct mark", plan.marks.relay)
        yield Rule(f"{related} {ours} ct direction reply {divert} counter accept", f"{label} to servers")


def _from_lo(plan: Plan) -> Iterator[Rule]:
    ours, to_us = _is(plan, "meta mark", plan.marks.relay), _is(plan, "meta mark", plan.marks.outbound)
    if plan.speaks_here:
        # The first packet of a connection to a server here, or of one that conntrack has forgotten (`conntrack -F`).
        unmarked = f"ct direction original {_is(plan, 'ct mark', 0)}"
        remember = f"{unmarked} {_set(plan, 'ct mark', plan.marks.relay)}"
        yield Rule(f"{ours} {remember} counter accept", "from the relay to this host")
    yield Rule(f"{ours} accept", "from the relay")
    if plan.mode != "tproxy" or not plan.outbound:
        return
    for family in plan.families:
        to = f"tproxy {_NAMES[family]} to {_listener(plan, family)}:{plan.outbound_port}"
        yield Rule(
            f"{to_us} meta nfproto ipv{family} meta l4proto tcp {to} counter accept", f"to the relay, IPv{family}"
        )
    # Without this a program here would wait in vain for a dead relay: its packets are on lo and cannot go back.
    yield Rule(f"{to_us} meta l4proto tcp counter reject with tcp reset", "to the relay, which is not there")


def _output(plan: Plan, state: State) -> Iterator[Rule]:
    divert = _set(plan, "meta mark", plan.marks.outbound)
    ends = "fib saddr type local fib daddr type != local"
    answers = f"ct direction reply {_is(plan, 'ct mark', plan.marks.relay)} {ends}"
    to_relay = Rule(f"{answers} {divert} counter accept", "answers to the relay in the name of others")
    from_servers = plan.imitates and plan.keeps_source
    if from_servers:
        # First, because with tcp_fwmark_accept=1 the answers of a server here carry the relay's mark too.
        yield to_relay
        # Not where both sides share an entry: this would be the client's mark then.
        unmarked = _is(plan, "ct mark", 0)
        ours = f"{_is(plan, 'meta mark', plan.marks.relay)} {_SYN} {unmarked} fib saddr type != local"
        yield Rule(f"{ours} {_set(plan, 'ct mark', plan.marks.relay)}", "the relay in the name of a client")
    if plan.mode == "tproxy" and plan.imitates:
        answer = f'oifname != "lo" {_is(plan, "meta mark", plan.marks.relay)} {_SYN_ACK}'
        yield Rule(f"{answer} {_set(plan, 'ct mark', plan.marks.inbound)}", "the relay answers a client")
    if plan.mode != "tproxy" or not plan.outbound:
        return
    yield from _exempt(plan)
    relayed = f"ct direction original {_is(plan, 'ct mark', plan.marks.outbound)}"
    yield Rule(f"{relayed} {divert} counter accept", "packets of relayed connections")
    if not from_servers:
        # Behind the exemption of the relay: by the rule of another, its own connections may have its mark, too.
        yield to_relay
    if state != "active":
        return
    remember = _set(plan, "ct mark", plan.marks.outbound)
    for family in plan.families:
        match = f"meta nfproto ipv{family} {_SYN} tcp dport {_ports(plan.outbound)}"
        yield Rule(f"{match} {remember} {divert} counter", f"outbound, IPv{family}")


def _exempt(plan: Plan) -> Iterator[Rule]:
    """What is never outbound."""
    yield Rule(f"{_is(plan, 'meta mark', plan.marks.relay)} counter return", "from the relay")
    if plan.exempt_uid is not None:
        yield Rule(f"meta skuid {plan.exempt_uid} counter return", f"from account {plan.exempt_uid}")
    yield Rule("fib daddr type local return", "to this host itself")
    for family in plan.families:
        yield Rule(f"{_never(family)} return", f"never intercepted, IPv{family}")


def _nat_prerouting(plan: Plan, state: State) -> Iterator[Rule]:
    yield _TRACKED
    if state != "active":
        return
    for family in plan.families:
        match = f"{_arrives(plan)}meta nfproto ipv{family} {_SYN} tcp dport {_ports(plan.inbound)}"
        yield Rule(f"{_arrives(plan)}{_never(family)} return", f"never intercepted, IPv{family}")
        yield Rule(f"{match} counter {_redirect(plan, family, plan.inbound_port)}", f"inbound, IPv{family}")


def _nat_keep(plan: Plan) -> Iterator[Rule]:
    """A packet that has been translated, if only to what it was, is not translated again by the chains that follow."""
    for family in plan.families:
        name, ours = _NAMES[family], _is(plan, "meta mark", plan.marks.inbound)
        yield Rule(f"meta nfproto ipv{family} {ours} dnat {name} to {name} daddr", f"keeps its address, IPv{family}")


def _nat_output(plan: Plan, state: State) -> Iterator[Rule]:
    yield _TRACKED
    if state != "active":
        return
    yield from _exempt(plan)
    for family in plan.families:
        match = f"meta nfproto ipv{family} {_SYN} tcp dport {_ports(plan.outbound)}"
        yield Rule(f"{match} counter {_redirect(plan, family, plan.outbound_port)}", f"outbound, IPv{family}")


def _not_for_listeners(plan: Plan) -> Iterator[Rule]:
    """A server answers a client whose port has the number of ours: the socket that is found is a listener for all
    addresses, which would answer with a reset. One that listens on an address of its own is not found."""
    if any(plan.on_address(family) is None for family in plan.families):
        yield Rule(f"{_NOT_SYN} socket wildcard 1 return", "to a port that has the number of ours")


def _zone_in(plan: Plan) -> Iterator[Rule]:
    yield from _not_for_listeners(plan)
    ports = _ports(plan.inbound)
    match = f'iifname != "lo" {_NOT_SYN} tcp sport {ports} tcp dport != {ports} socket transparent 1'
    yield Rule(f"{match} ct zone set {CONNTRACK_ZONE}", "server side of a connection that keeps its port")


def _zone_out(plan: Plan) -> Iterator[Rule]:
    ports, ours = _ports(plan.inbound), _is(plan, "meta mark", plan.marks.relay)
    match = f'oifname != "lo" {ours} fib saddr type != local tcp dport {ports} tcp sport != {ports}'
    yield Rule(f"{match} ct zone set {CONNTRACK_ZONE}", "server side of a connection that keeps its port")


def _redirect(plan: Plan, family: Family, port: int) -> str:
    """To the interface's own address; to another one, where the listeners have nothing else."""
    address = plan.on_address(family)
    if address is None or address in ("127.0.0.1", "::1"):
        return f"redirect to :{port}"
    return f"dnat {_NAMES[family]} to {_listener(plan, family)}:{port}"


def _listener(plan: Plan, family: Family) -> str:
    address = plan.on_address(family) or ""
    return f"[{address}]" if ":" in address else address


def _arrives(plan: Plan) -> str:
    return f'iifname "{plan.interface}" ' if plan.interface else 'iifname != "lo" '


def _never(family: Family) -> str:
    return f"{_NAMES[family]} daddr {{ {', '.join(NEVER[family])} }}"
