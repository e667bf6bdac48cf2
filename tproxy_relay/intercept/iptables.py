"""The plan as iptables-restore text, for each family: the same rules as in nft.py, in chains of our own.

What differs from nft, and cannot be helped:

- without a listener xt_TPROXY drops the packet instead of letting it go on, so a dead relay is a black hole until
  somebody takes the rules away or puts those of the state `closed` there (guard.py);
- REJECT exists in the table `filter` only, and rules are not tied to a process.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from tproxy_relay.intercept.iptables_save import PREFIX, TABLES, Saved
from tproxy_relay.intercept.iptables_words import NOT_SYN as _NOT_SYN
from tproxy_relay.intercept.iptables_words import SYN as _SYN
from tproxy_relay.intercept.iptables_words import TCP as _TCP
from tproxy_relay.intercept.iptables_words import Rule
from tproxy_relay.intercept.iptables_words import bits as _bits
from tproxy_relay.intercept.iptables_words import by_ports as _by_ports
from tproxy_relay.intercept.iptables_words import marked as _marked
from tproxy_relay.intercept.plan import CONNTRACK_ZONE, NEVER, Family, Plan, State

_SYN_ACK = "-p tcp -m tcp --tcp-flags SYN,ACK SYN,ACK"
_ACK = "-p tcp -m tcp --tcp-flags SYN,RST,ACK ACK"
_ICMP: dict[Family, str] = {4: "icmp", 6: "icmpv6"}
_ERRORS: dict[Family, str] = {4: "-p icmp -m icmp ! --icmp-type redirect", 6: "-p icmpv6"}
"""The socket match looks at no others but errors and, of IPv4, redirects (nf_socket_ipv4.c, nf_socket_ipv6.c)."""


_OWN_ZONE = f"-j CT --zone {CONNTRACK_ZONE}"

_TRACKED = Rule("-m conntrack --ctstate INVALID", "-j RETURN", "keeps connections tracked")
"""Without any rule that needs it, the kernel stops tracking connections: see nft.py."""


class Chain(NamedTuple):
    """A chain of ours in a table; `hook` is the built-in chain that leads there, '' for none, for one protocol."""

    table: str
    name: str
    hook: str
    rules: tuple[Rule, ...]
    protocol: str = "tcp"


def chains(plan: Plan, state: State, family: Family) -> list[Chain]:
    """What is installed for one family; chains come before those that lead to them."""
    return [chain for chain in _all_chains(plan, state, family) if chain.rules]


def restore(plan: Plan, state: State, family: Family, saved: Saved, made: str = "") -> str:
    """The text for `iptables-restore --noflush` that puts it in the place of what iptables-save has shown.
    `made` is remembered in the rules, see `_jump`."""
    lines: list[str] = []
    wanted = chains(plan, state, family)
    for table in TABLES:
        here = [chain for chain in wanted if chain.table == table]
        old = saved.chains_in(table)
        jumps = saved.jumps_in(table)
        if not (here or old or jumps):
            continue
        names = [PREFIX + chain.name for chain in here]
        lines += [f"*{table}", *(f":{name} - [0:0]" for name in {**dict.fromkeys(names), **dict.fromkeys(old)})]
        lines += [line.replace("-A ", "-D ", 1) for line in jumps]
        for chain in here:
            lines += [f"-A {PREFIX}{chain.name} {rule.text}" for rule in chain.rules]
        lines += [_jump(plan, state, chain, made) for chain in here if chain.hook]
        lines += [f"-X {name}" for name in old if name not in names]  # emptied by their line with the colon
        lines.append("COMMIT")
    return "\n".join([*lines, ""]) if lines else ""


def removal(saved: Saved) -> str:
    """The text that takes away everything of ours that iptables-save has shown; '' if there was nothing."""
    lines: list[str] = []
    for table in TABLES:
        old = saved.chains_in(table)
        jumps = saved.jumps_in(table)
        if old or jumps:
            lines += [f"*{table}", *(f":{name} - [0:0]" for name in old)]
            lines += [line.replace("-A ", "-D ", 1) for line in jumps]
            lines += [*(f"-X {name}" for name in old), "COMMIT"]
    return "\n".join([*lines, ""]) if lines else ""


def again(former: Saved, now: Saved) -> str:
    """The text that puts what iptables-save has shown in the place of what it shows now."""
    lines: list[str] = []
    for table in TABLES:
        names = list(dict.fromkeys([*former.chains_in(table), *now.chains_in(table)]))
        if names:
            lines += [f"*{table}", *(f":{name} - [0:0]" for name in names)]
            lines += [line.replace("-A ", "-D ", 1) for line in now.jumps_in(table)]
            lines += [rule.text for rule in former.rules if rule.chain in former.chains_in(table)]
            # The last one first, for each comes before those that are there.
            lines += [re.sub(r"^-A (\S+)", r"-I \1 1", line) for line in reversed(former.jumps_in(table))]
            lines += [f"-X {name}" for name in names if name not in former.chains_in(table)]
            lines.append("COMMIT")
    return "\n".join([*lines, ""])


def expected(plan: Plan, state: State, family: Family) -> dict[str, list[str]]:
    """The labels of the rules in each chain of ours, and of the jumps, by the name of their built-in chain."""
    wanted: dict[str, list[str]] = {}
    for chain in chains(plan, state, family):
        wanted[PREFIX + chain.name] = [rule.label for rule in chain.rules]
    return wanted


def _jump(plan: Plan, state: State, chain: Chain, made: str) -> str:
    """First in its chain: what comes before could take packets away. The comment remembers the built-in chains that
    did not exist (iptables-nft makes them when they are first used), so that they can go with us."""
    note = f" made={made}" if made else ""
    comment = f'-m comment --comment "plan {plan.digest} {state}{note}"'
    return f"-I {chain.hook} 1 -p {chain.protocol} {comment} -j {PREFIX}{chain.name}"


def _all_chains(plan: Plan, state: State, family: Family) -> Iterator[Chain]:
    tproxy = plan.mode == "tproxy"
    if state == "closed":
        yield Chain("filter", "CLOSED_IN", "INPUT", tuple(_closed_inbound(plan, family)))
        yield Chain("filter", "CLOSED_FWD", "FORWARD", tuple(_closed_inbound(plan, family)))
        yield Chain("filter", "CLOSED_OUT", "OUTPUT", tuple(_closed_outbound(plan, family)))
        return
    if plan.preserve_source == "full" and plan.inbound:
        yield Chain("raw", "ZONE_PRE", "PREROUTING", tuple(_zone_prerouting(plan)))
        yield Chain("raw", "ZONE_OUT", "OUTPUT", tuple(_zone_output(plan)))
    if plan.needs_routing:
        divert = (
            Rule("", f"-j MARK --set-xmark {_bits(plan, plan.marks.inbound)}", "packets of relayed connections"),
            Rule("", "-j ACCEPT", "packets of relayed connections"),
        )
        yield Chain("mangle", "DIVERT", "", divert)
        yield Chain("mangle", "LO", "", tuple(_from_lo(plan, family)))
        if tproxy and plan.inbound:
            yield Chain("mangle", "ANSWERED", "", tuple(_answered(plan, state, family)))
        yield Chain("mangle", "PRE", "PREROUTING", tuple(_prerouting(plan, state, family)))
    if plan.imitates:
        yield Chain("mangle", "ERRORS", "PREROUTING", tuple(_errors(family)), _ICMP[family])
        yield Chain("mangle", "OWN_ERRORS", "OUTPUT", tuple(_own_errors(plan, family)), _ICMP[family])
    if plan.imitates or (tproxy and plan.outbound):
        yield Chain("mangle", "OUT", "OUTPUT", tuple(_output(plan, state, family)))
    if plan.beside_nat:
        ours = Rule(f"-m mark --mark {_bits(plan, plan.marks.inbound)}", "-j ACCEPT", "keeps its address")
        yield Chain("nat", "NAT_KEEP", "PREROUTING", (ours,))
    if not tproxy and plan.inbound:
        yield Chain("nat", "NAT_PRE", "PREROUTING", tuple(_nat_prerouting(plan, state, family)))
    if not tproxy and plan.outbound:
        yield Chain("nat", "NAT_OUT", "OUTPUT", tuple(_nat_output(plan, state, family)))


def _prerouting(plan: Plan, state: State, family: Family) -> Iterator[Rule]:
    yield Rule("-i lo", f"-g {PREFIX}LO", "sent by this host to itself")
    ours = f"{_NOT_SYN} -m socket --transparent"
    yield Rule(ours, f"-j {PREFIX}DIVERT", "packets of relayed connections")
    if plan.mode != "tproxy" or not plan.inbound:
        return
    answered = f"{_TCP} {_marked(plan, plan.marks.inbound, 'ORIGINAL')}"
    yield Rule(answered, f"-j {PREFIX}ANSWERED", "from clients that the relay has answered")
    if state == "active":
        yield from _never(family)
        yield from _by_ports(f"{_arrives(plan)} {_SYN}", plan.inbound, _to_listener(plan, family), "inbound")


def _answered(plan: Plan, state: State, family: Family) -> Iterator[Rule]:
    """What clients send without a socket being there, whose SYN was answered: the listener knows the cookie. While the
    relay drains there is none: the server, which knows nothing of the connection, resets it."""
    if state == "active":
        yield Rule(_ACK, _to_listener(plan, family), "to the listener")
    # The client did not hear the answer, and this SYN may be left to go direct.
    yield Rule(_SYN, f"-j CONNMARK --set-xmark {_bits(plan, 0)}", "has not heard it, and sends its SYN again")


def _to_listener(plan: Plan, family: Family) -> str:
    target = f"-j TPROXY --on-port {plan.inbound_port}{_on_ip(plan, family)}"
    return f"{target} --tproxy-mark {_bits(plan, plan.marks.inbound)}"


def _errors(family: Family) -> Iterator[Rule]:
    match = f"! -i lo {_ERRORS[family]} -m socket --transparent"
    yield Rule(match, f"-j {PREFIX}DIVERT", "errors about packets of the relay")


def _own_errors(plan: Plan, family: Family) -> Iterator[Rule]:
    """This host's own, about what the relay sends in the name of others: a neighbour that does not answer, a tunnel."""
    label, divert = "errors about packets of the relay", f"-j MARK --set-xmark {_bits(plan, plan.marks.outbound)}"
    related = f"! -o lo -p {_ICMP[family]} -m conntrack --ctstate RELATED"
    if plan.mode == "tproxy":
        # Both sides of a connection that keeps its port have the same four numbers.
        direction = "" if plan.preserve_source == "full" else " --ctdir ORIGINAL"
        ours = f"-m connmark --mark {_bits(plan, plan.marks.inbound)}"
        yield Rule(f"{related}{direction} {ours}", divert, f"{label} to clients")
    if plan.keeps_source:
        ours = f"-m connmark --mark {_bits(plan, plan.marks.relay)}"
        yield Rule(f"{related} --ctdir REPLY {ours}", divert, f"{label} to servers")


def _from_lo(plan: Plan, family: Family) -> Iterator[Rule]:
    ours = f"{_TCP} -m mark --mark {_bits(plan, plan.marks.relay)}"
    to_us = f"{_TCP} -m mark --mark {_bits(plan, plan.marks.outbound)}"
    if plan.speaks_here:
        # The first packet of a connection to a server here, or of one that conntrack has forgotten (`conntrack -F`).
        remember = f"-j CONNMARK --set-xmark {_bits(plan, plan.marks.relay)}"
        yield Rule(f"{ours} {_marked(plan, 0, 'ORIGINAL')}", remember, "from the relay to this host")
    yield Rule(ours, "-j ACCEPT", "from the relay")
    if plan.mode != "tproxy" or not plan.outbound:
        return
    # xt_TPROXY drops packets of established sockets that are not transparent. A bare SYN would also match a server
    # here that listens on the same port.
    not_syn = to_us.replace(_TCP, _NOT_SYN, 1)
    yield Rule(f"{not_syn} -m socket", "-j ACCEPT", "packets of relayed connections")
    target = f"-j TPROXY --on-port {plan.outbound_port}{_on_ip(plan, family)}"
    yield Rule(to_us, f"{target} --tproxy-mark {_bits(plan, plan.marks.outbound)}", "to the relay")


def _output(plan: Plan, state: State, family: Family) -> Iterator[Rule]:
    divert = f"-j MARK --set-xmark {_bits(plan, plan.marks.outbound)}"
    answers = f"{_TCP} {_marked(plan, plan.marks.relay, 'REPLY')} -m addrtype --src-type LOCAL ! --dst-type LOCAL"
    to_relay = [Rule(answers, then, "answers to the relay in the name of others") for then in (divert, "-j RETURN")]
    from_servers = plan.imitates and plan.keeps_source
    if from_servers:
        # First, because with tcp_fwmark_accept=1 the answers of a server here carry the relay's mark too.
        yield from to_relay
        # Not where both sides share an entry: this would be the client's mark then.
        unmarked = f"-m connmark --mark {_bits(plan, 0)} -m addrtype ! --src-type LOCAL"
        remember = f"-j CONNMARK --set-xmark {_bits(plan, plan.marks.relay)}"
        ours = f"{_SYN} -m mark --mark {_bits(plan, plan.marks.relay)} {unmarked}"
        yield Rule(ours, remember, "the relay in the name of a client")
    if plan.mode == "tproxy" and plan.inbound:
        answer = f"! -o lo {_SYN_ACK} -m mark --mark {_bits(plan, plan.marks.relay)}"
        remember = f"-j CONNMARK --set-xmark {_bits(plan, plan.marks.inbound)}"
        yield Rule(answer, remember, "the relay answers a client")
    if plan.mode != "tproxy" or not plan.outbound:
        return
    yield from _exempt(plan, family)
    if not from_servers:
        # Behind the exemption of the relay: by the rule of another, its own connections may have its mark, too.
        yield from to_relay
    if state == "active":
        remember = f"-j CONNMARK --set-xmark {_bits(plan, plan.marks.outbound)}"
        yield from _by_ports(_SYN, plan.outbound, remember, "outbound")
    relayed = f"{_TCP} -m conntrack --ctdir ORIGINAL -m connmark --mark {_bits(plan, plan.marks.outbound)}"
    yield Rule(relayed, divert, "packets of relayed connections")


def _exempt(plan: Plan, family: Family) -> Iterator[Rule]:
    """What is never outbound."""
    yield Rule(f"-m mark --mark {_bits(plan, plan.marks.relay)}", "-j RETURN", "from the relay")
    if plan.exempt_uid is not None:
        label = f"from account {plan.exempt_uid}"
        yield Rule(f"-m owner --uid-owner {plan.exempt_uid}", "-j RETURN", label)
    yield Rule("-m addrtype --dst-type LOCAL", "-j RETURN", "to this host itself")
    yield from _never(family)


def _nat_prerouting(plan: Plan, state: State, family: Family) -> Iterator[Rule]:
    yield _TRACKED
    yield from _never(family)
    if state == "active":
        target = _redirect(plan, family, plan.inbound_port)
        yield from _by_ports(f"{_arrives(plan)} {_SYN}", plan.inbound, target, "inbound")


def _nat_output(plan: Plan, state: State, family: Family) -> Iterator[Rule]:
    yield _TRACKED
    yield from _exempt(plan, family)
    if state == "active":
        yield from _by_ports(_SYN, plan.outbound, _redirect(plan, family, plan.outbound_port), "outbound")


def _closed_inbound(plan: Plan, family: Family) -> Iterator[Rule]:
    if plan.inbound:
        reject = "-j REJECT --reject-with tcp-reset"
        if plan.mode == "tproxy":
            answered = f"{_ACK} {_marked(plan, plan.marks.inbound, 'ORIGINAL')}"
            yield Rule(answered, reject, "answered by a relay that is gone")
        yield from _never(family)
        yield from _by_ports(f"{_arrives(plan)} {_SYN}", plan.inbound, reject, "inbound without a relay")


def _closed_outbound(plan: Plan, family: Family) -> Iterator[Rule]:
    if plan.outbound:
        yield from _exempt(plan, family)
        yield from _by_ports(_SYN, plan.outbound, "-j REJECT --reject-with tcp-reset", "outbound without a relay")


def _zone_prerouting(plan: Plan) -> Iterator[Rule]:
    yield from _by_ports(_TCP, plan.inbound, "-j RETURN", "to a server", "--dports")
    match = f"! -i lo {_NOT_SYN} -m socket --transparent"
    yield from _by_ports(match, plan.inbound, _OWN_ZONE, "server side of a connection that keeps its port", "--sports")


def _zone_output(plan: Plan) -> Iterator[Rule]:
    yield from _by_ports(_TCP, plan.inbound, "-j RETURN", "from a server", "--sports")
    match = f"! -o lo {_TCP} -m addrtype ! --src-type LOCAL -m mark --mark {_bits(plan, plan.marks.relay)}"
    yield from _by_ports(match, plan.inbound, _OWN_ZONE, "server side of a connection that keeps its port", "--dports")


def _never(family: Family) -> Iterator[Rule]:
    for network in NEVER[family]:
        yield Rule(f"-d {network}", "-j RETURN", "never intercepted")


def _redirect(plan: Plan, family: Family, port: int) -> str:
    """To the interface's own address; to another one, where the listeners have nothing else."""
    address = plan.on_address(family)
    if address is None or address in ("127.0.0.1", "::1"):
        return f"-j REDIRECT --to-ports {port}"
    host = f"[{address}]" if family == 6 else address
    return f"-j DNAT --to-destination {host}:{port}"


def _on_ip(plan: Plan, family: Family) -> str:
    address = plan.on_address(family)
    return f" --on-ip {address}" if address else ""


def _arrives(plan: Plan) -> str:
    return f"-i {plan.interface}" if plan.interface else "! -i lo"
