"""The routing that intercepted packets need: a table in which every address is local, and who looks there.

    P      IN   from lo      skip to P+2
    P      OUT  from lo      look in the table
    P+1    IN                look in the table
    P+1    OUT  from lo      unreachable, with `on-failure closed`, while the table is empty
    P+2    nothing, where the skip lands

IN counts only for packets that came in by an interface. The kernel asks the same rules twice more, both times as if
from lo: when it checks a packet's source (src_valid_mark), and for the SYN-ACKs of our listeners, which inherit the
mark (tcp_fwmark_accept). One global rule for the mark would lose all traffic on hosts with either setting.

IPv6 may be switched on and off. The rules are there all the while; the route cannot be, while it is off, and is put
there when it comes. What a program here sends in the moment before must not leave unrelayed if that is to be refused.
Where the route is, what it does not match goes direct: a socket that is bound to a device has no way over lo.
"""

import contextlib
import json
from typing import Any

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.intercept import programs
from tproxy_relay.intercept.plan import IPV4, IPV6, Family, Plan

ALL_FAMILIES: tuple[Family, ...] = (4, 6)

PROTOCOL = 206
"""Whose rules and routes these are (rtnetlink(7), rtm_protocol): a number that nobody else uses, so that ours are found
whatever the plan was, and nobody else's are taken for ours."""


_UNREACHABLE = "7"
"""linux/fib_rules.h, FR_ACT_UNREACHABLE, as `ip -N` writes it."""


def ipv6_is_on() -> bool:
    """True if any interface has an IPv6 address. Without one there is nothing to intercept, and no route can be
    added (net.ipv6.conf.all.disable_ipv6)."""
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as addresses:
        return bool(addresses.read(1))
    # Not in this kernel, or /proc is mounted with subset=pid (proc(5)).
    return any(one.get("addr_info") for one in ask(IPV6, "address", "show"))


def rules(plan: Plan) -> list[str]:
    """The rules of routing as the words after `ip rule add`, for each family the same."""
    first, mask, table = plan.route_priority, f"{plan.mark_mask:#x}", plan.route_table
    inbound, outbound = f"fwmark {plan.marks.inbound:#x}/{mask}", f"fwmark {plan.marks.outbound:#x}/{mask}"
    return [
        f"pref {first} {inbound} iif lo goto {first + 2} protocol {PROTOCOL}",
        f"pref {first} {outbound} iif lo lookup {table} protocol {PROTOCOL}",
        f"pref {first + 1} {inbound} lookup {table} protocol {PROTOCOL}",
        f"pref {first + 2} nop protocol {PROTOCOL}",
    ]


def refusal(plan: Plan) -> list[str]:
    """The rule that is there while the route cannot be, as the words after `ip rule add`; none if what is not relayed
    may leave."""
    outbound = f"fwmark {plan.marks.outbound:#x}/{plan.mark_mask:#x}"
    needed = plan.needs_routing and plan.on_failure == "closed" and plan.outbound
    return [f"pref {plan.route_priority + 1} {outbound} iif lo unreachable protocol {PROTOCOL}"] if needed else []


def route(table: object) -> str:
    """The one route, as the words after `ip route add`."""
    return f"local default dev lo table {table} proto {PROTOCOL}"


def batch(plan: Plan) -> str:
    """All of it for one family with its route, as `ip -batch` reads it."""
    return "\n".join([*_commands(plan), ""])


Added = dict[Family, list[str]]
"""By family, the lines that were added."""


def install(plan: Plan, added: Added) -> None:
    """Add what is missing, and note it before. Raises SystemRefusedError if the table is in use by somebody else
    or lo is down, ProgramError or CapabilityMissingError."""
    for family in plan.families if plan.needs_routing else ():
        foreign = foreign_routes(plan, family)
        if foreign:
            raise SystemRefusedError(
                f"routing table {plan.route_table} has a route to {foreign[0]} that is not the relay's "
                f"(`ip -{family} route show table {plan.route_table}`): choose another number with --route-table"
            )
    for family in ALL_FAMILIES:
        added[family] = missing(plan, family)
        if added[family]:
            _require_lo()
            programs.run(["ip", f"-{family}", "-batch", "-"], "\n".join([*added[family], ""]))


def _require_lo() -> None:
    """The kernel adds some routes to an interface that is down, and drops what they lead there."""
    for one in ask(IPV4, "link", "show", "dev", "lo"):
        if "UP" not in one.get("flags", ("UP",)):
            raise SystemRefusedError("interface lo is down; intercepted packets are routed to it: ip link set lo up")


def take_back(added: Added) -> None:
    """Delete what an `install` has added, and nothing else."""
    for family, lines in added.items():
        _delete(family, lines)


def tidy(plan: Plan) -> None:
    """Take away what an earlier plan has left, and the refusal where the route has come."""
    for family in ALL_FAMILIES:
        there = _there(family)
        kept = [*_wanted(plan, family, there), *_refusal(plan, family, there)]
        _delete(family, [line for line in there if line not in kept])


def make_way(plan: Plan) -> None:
    """Take away the refusal where the route has come, and nothing else."""
    for family in ALL_FAMILIES:
        _delete(family, _in_the_way(plan, family, _there(family)))


def problems(plan: Plan, *, tidied: bool = True) -> list[str]:
    """In words, what is missing, and if `tidied` the refusal where it is in spite of the route."""
    found: list[str] = []
    for family in plan.families:
        there = _there(family)
        wrong = {"missing": _missing(plan, family, there)}
        if tidied:
            wrong["in the way"] = _in_the_way(plan, family, there)
        for state, lines in wrong.items():
            found += [f"ip -{family}: '{line.replace(' add ', ' ', 1)}' is {state}" for line in lines]
    return found


def missing(plan: Plan, family: Family) -> list[str]:
    """The lines of `batch` for what the kernel does not have."""
    return _missing(plan, family, _there(family))


def uninstall() -> bool:
    """Take away what is ours, of whatever plan. True if there was anything."""
    return any([_delete(family, _there(family)) for family in ALL_FAMILIES])


def listing() -> list[str]:
    """What of ours the kernel has, for people."""
    return [f"ip -{family} {line.replace(' add ', ': ', 1)}" for family in ALL_FAMILIES for line in _there(family)]


def foreign_routes(plan: Plan, family: Family) -> list[str]:
    """Destinations of the routes of somebody else in our table."""
    routes = ask(family, "route", "show", "table", str(plan.route_table))
    return [str(one.get("dst")) for one in routes if one.get("protocol") != str(PROTOCOL)]


def _commands(plan: Plan) -> list[str]:
    return [f"route add {route(plan.route_table)}", *(f"rule add {rule}" for rule in rules(plan))]


def _missing(plan: Plan, family: Family, there: list[str]) -> list[str]:
    return [line for line in _wanted(plan, family, there) if line not in there]


def _wanted(plan: Plan, family: Family, there: list[str]) -> list[str]:
    if not plan.needs_routing or family not in plan.families:
        return []
    way, *others = _commands(plan)
    if family == IPV4 or way in there or ipv6_is_on():
        return [way, *others]
    return [*others, *_refusal(plan, family, there)]


def _refusal(plan: Plan, family: Family, there: list[str]) -> list[str]:
    """What may stand in for the route that is not there."""
    lines = [f"rule add {rule}" for rule in refusal(plan)] if family in plan.families else []
    return lines if _commands(plan)[0] not in there else []


def _in_the_way(plan: Plan, family: Family, there: list[str]) -> list[str]:
    arrived = _commands(plan)[0] in there and family in plan.families
    return [line for rule in refusal(plan) if arrived and (line := f"rule add {rule}") in there]


def _there(family: Family) -> list[str]:
    """What of ours the kernel has, as the lines that would add it."""
    routes = ask(family, "route", "show", "table", "all", "proto", str(PROTOCOL))
    found = [f"route add {route(one['table'])}" for one in routes if "table" in one]
    ours = (one for one in ask(family, "rule", "show") if one.get("protocol") == str(PROTOCOL))
    return found + [f"rule add {_words(one)}" for one in ours]


def _delete(family: Family, lines: list[str]) -> bool:
    if lines:
        undo = [line.replace(" add ", " del ", 1) for line in reversed(lines)]
        programs.run(["ip", f"-{family}", "-force", "-batch", "-"], "\n".join([*undo, ""]), check=False)
    return bool(lines)


def _words(one: dict[str, Any]) -> str:
    """A rule as `ip -json rule` tells it, in the words of `rules`."""
    words = [f"pref {one['priority']}"]
    if "fwmark" in one:
        words.append(f"fwmark {one['fwmark']}/{one.get('fwmask', '0xffffffff')}")
    if "iif" in one:
        words.append(f"iif {one['iif']}")
    if "goto" in one:
        words.append(f"goto {one['goto']}")
    elif "table" in one:
        words.append(f"lookup {one['table']}")
    elif one.get("action") == _UNREACHABLE:
        words.append("unreachable")
    elif "nop" in one:
        words.append("nop")
    return " ".join([*words, f"protocol {PROTOCOL}"])


def ask(family: Family, *words: str) -> list[dict[str, Any]]:
    """What `ip -json` answers, with numbers for names; nothing for a family or table that the kernel does not have.
    Raises ProgramError if `ip` cannot be run."""
    done = programs.run(["ip", "-N", "-json", f"-{family}", *words], check=False)
    try:
        answer = json.loads(done.stdout or "[]")
    except ValueError:
        return []
    return [one for one in answer if isinstance(one, dict)]
