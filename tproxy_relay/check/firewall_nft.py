"""What `nft -j list ruleset` prints, as chains that firewall.py can judge (libnftables-json(5)).

nft joins the words of its command line and reads them as one text, so names that others chose stand there only if they
are plain. Else the same is said in JSON, where a name is a string.
"""

import functools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tproxy_relay.check.firewall import ALL_BITS, Chain, Change, Condition, Rule

_FAMILIES = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_ACTIONS = {"accept", "drop", "return", "jump", "goto", "reject", "tproxy", "redirect", "dnat", "snat"}
_ACTIONS |= {"masquerade", "synproxy"}
_STATEMENTS = {"counter", "log", "mangle", "set", "notrack", "meter", "quota", "ct helper", "flow"}
"""They say neither yes nor no."""
_PORTS = {"tcp dport": "ports", "th dport": "ports", "tcp sport": "sports", "th sport": "sports"}
_REVERSE = {"saddr", "iif"}
"""The flags of a `fib` that asks for the way back."""
_PLAIN = re.compile("[A-Za-z][A-Za-z0-9/_.-]*")
"""A name that nft reads as one word."""


def chains(objects: Iterable[dict[str, Any]], leave_out: Iterable[tuple[str, str]]) -> Mapping[str, dict[str, Chain]]:
    """By table, every chain of inet, ip and ip6 but those of the tables to leave out (family, name)."""
    left_out = set(leave_out)
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    tables: dict[str, dict[str, Chain]] = {}
    found = [one for one in objects if _family(one) in _FAMILIES]
    for one in (one["rule"] for one in found if "rule" in one):
        rules.setdefault((one["family"], one["table"], one["chain"]), []).extend(_rules(one))
    for one in (one["chain"] for one in found if "chain" in one):
        if (one["family"], one["table"]) not in left_out:
            key = (one["family"], one["table"], one["name"])
            tables.setdefault(f"nft {key[0]} {key[1]}", {})[one["name"]] = _chain(one, rules.get(key, []))
    return tables


def _family(one: dict[str, Any]) -> str:
    return next((str(value.get("family")) for value in one.values() if isinstance(value, dict)), "")


def _chain(one: dict[str, Any], rules: list[Rule]) -> Chain:
    place = f"{one['family']} {shlex.quote(one['table'])} {shlex.quote(one['name'])}"
    plain = all(_PLAIN.fullmatch(one[key]) for key in ("table", "name"))
    ids = {"family": one["family"], "table": one["table"], "chain": one["name"]}
    insert = f"nft insert rule {place}"
    return Chain(
        name=one["name"],
        title=f"nft chain {place}",
        hook=one.get("hook", ""),
        kind=one.get("type", ""),
        families=_FAMILIES[one["family"]],
        drops=one.get("policy") == "drop",
        rules=tuple(rules),
        insert=lambda mask: f"{insert} 'meta mark & {mask:#010x} != 0 accept'" if plain else _let_in(ids, mask),
        priority=one["prio"] if isinstance(one.get("prio"), int) else 0,
        let_pass=lambda condition: f"{insert} '{condition} accept'" if plain else "",
    )


def _rules(one: dict[str, Any]) -> Iterator[Rule]:
    """One, or for a map of verdicts one for each of its elements."""
    place = f"{one['family']} {shlex.quote(one['table'])} {shlex.quote(one['chain'])} handle {one['handle']}"
    conditions: list[Condition] = []
    marks: list[tuple[int, int]] = []
    action = target = ""
    verdicts: list[tuple[Condition, str, str]] = []
    changes: list[Change] = []
    for expression in one.get("expr", ()):
        (kind, value), *_ = expression.items()
        if kind == "match":
            conditions.append(_condition(value))
            marks += _mark_of(value["left"], value["right"])
        elif kind == "mangle":
            marks += _mark_set(value["key"], value["value"])
            changes += _changes(value["key"], value["value"])
        elif kind in _ACTIONS:
            if not action:  # `tproxy to :1 accept`
                action, target = _verdict(expression)
        elif kind == "vmap" and isinstance(value["data"], dict) and "set" in value["data"]:
            for element, verdict in value["data"]["set"]:
                condition = _condition({"op": "==", "left": value["key"], "right": element})
                verdicts.append((condition, *_verdict(verdict)))
        elif kind not in _STATEMENTS:
            conditions.append(
                Condition("unknown")
            )  # a limit, a named map of verdicts, what iptables-nft keeps to itself
            action = action or ("maybe" if kind in ("vmap", "queue", "xt") else "")
    plain = Rule(
        conditions=tuple(conditions),
        action=action,
        target=target,
        marks=tuple(marks),
        where=f"nft rule {place}",
        changes=tuple(changes),
        untracks=any("notrack" in expression for expression in one.get("expr", ())),
        spare=functools.partial(_spare, one),
    )
    for condition, action, target in verdicts:
        yield replace(plain, conditions=(*conditions, condition), action=action, target=target)
    if not verdicts:
        yield plain


def _let_in(ids: dict[str, Any], mask: int) -> str:
    """The command that lets in packets with any of these bits in their mark, for a chain with an odd name."""
    bits = {"match": {"op": "!=", "left": {"&": [{"meta": {"key": "mark"}}, mask]}, "right": 0}}
    return _in_json({"insert": {"rule": {**ids, "expr": [bits, {"accept": None}]}}})


def _spare(one: dict[str, Any], bits: int, ours: int) -> str:
    """The rule in its place, as nft has given it (libnftables-json(5)): it keeps these bits where it sets a mark to a
    number, or else is for packets without them."""
    expressions = [_keeping(expression, ours) for expression in one.get("expr", ())]
    if expressions == one.get("expr"):
        without = {"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, bits]}, "right": 0}}
        expressions = [without, *expressions]
    return _in_json({"replace": {"rule": {**one, "expr": expressions}}})


def _in_json(change: dict[str, Any]) -> str:
    """The command for that change. printf leaves backslashes alone, echo not everywhere."""
    return f"printf %s {shlex.quote(json.dumps({'nftables': [change]}))} | nft -j -f -"


def _keeping(expression: dict[str, Any], ours: int) -> dict[str, Any]:
    change = expression.get("mangle", {})
    if not isinstance(change.get("value"), int) or _name(change["key"]) not in ("meta mark", "ct mark"):
        return expression
    kept = {"|": [{"&": [change["key"], ours]}, change["value"]]}
    return {"mangle": {"key": change["key"], "value": kept}}


def _verdict(expression: dict[str, Any]) -> tuple[str, str]:
    """What is done, and the chain that a jump leads to."""
    (kind, value), *_ = expression.items()
    target = value.get("target", "") if isinstance(value, dict) else ""
    return ("drop" if kind == "reject" else kind), str(target)


def _condition(match: dict[str, Any]) -> Condition:
    left, right, negated = match["left"], match["right"], match.get("op") == "!="
    name = _name(left)
    if match.get("op") not in ("==", "!=", "in"):
        return Condition("unknown")
    if name in _PORTS:
        ranges = _ranges(right)
        return Condition(_PORTS[name], ranges, negated) if ranges else Condition("unknown")
    if name in ("meta l4proto", "ip protocol", "ip6 nexthdr"):
        return Condition("proto", _words(right), negated)
    if name == "meta nfproto":
        return Condition("family", tuple("4" if word == "ipv4" else "6" for word in _words(right)), negated)
    if name in ("meta iifname", "meta iif", "meta oifname", "meta oif"):
        return Condition("iif" if " i" in name else "oif", _words(right), negated)
    if name in ("ct state", "ct status"):
        return Condition("state", _words(right), negated)
    if name in ("meta mark", "ct mark") and isinstance(right, int):
        return Condition("mark" if name == "meta mark" else "ct_mark", ((right, _mask(left)),), negated)
    if name == "fib" and isinstance(right, bool) and _REVERSE <= set(left["fib"]["flags"]):
        return Condition("way_back", ("exists" if right else "missing",), negated)
    if name.startswith(("udp ", "icmp ", "icmpv6 ", "sctp ")):
        return Condition("proto", (name.split()[0],))
    return Condition("unknown")


def _name(left: Any) -> str:
    """The thing that is asked for, as nft writes it."""
    if not isinstance(left, dict):
        return ""
    if "&" in left:
        return _name(left["&"][0])
    if "meta" in left:
        return f"meta {left['meta']['key']}"
    if "ct" in left:
        return f"ct {left['ct']['key']}"
    if "fib" in left:
        return "fib"
    if "payload" in left:
        return f"{left['payload'].get('protocol')} {left['payload'].get('field')}"
    return ""


def _mask(left: dict[str, Any]) -> int:
    masked = left.get("&")
    return masked[1] if masked and isinstance(masked[1], int) else ALL_BITS


def _mark_of(left: Any, right: Any) -> list[tuple[int, int]]:
    if _name(left) not in ("meta mark", "ct mark"):
        return []
    return [(value, _mask(left)) for value, _ in _ranges(right)]


def _mark_set(key: Any, value: Any) -> list[tuple[int, int]]:
    """The bits that a rule sets: `meta mark set 1`, `meta mark set meta mark & 0xff | 1`."""
    if _name(key) not in ("meta mark", "ct mark"):
        return []
    if isinstance(value, int):
        return [(value, ALL_BITS)]
    if isinstance(value, dict) and "|" in value and isinstance(value["|"][1], int):
        return [(value["|"][1], value["|"][1])]
    return []


def _changes(key: Any, value: Any) -> list[Change]:
    """What becomes of a mark: `meta mark set ct mark & 0xff | 1`."""
    what = {"meta mark": "mark", "ct mark": "ct_mark"}.get(_name(key))
    return [_formula(value)._replace(what=what)] if what else []


def _formula(value: Any) -> Change:
    if isinstance(value, int):
        return Change("", 0, 0, value)
    if _name(value) in ("meta mark", "ct mark") and "&" not in value:
        of_mark = "meta" in value
        return Change("", ALL_BITS * of_mark, ALL_BITS * (not of_mark), 0)
    for sign in ("&", "|", "^") if isinstance(value, dict) else ():
        if sign in value and isinstance(value[sign][1], int):
            first, second = _formula(value[sign][0]), value[sign][1]
            if sign == "^":
                return first._replace(value=first.value ^ second)
            keep = second if sign == "&" else ALL_BITS & ~second
            return first._replace(
                of_mark=first.of_mark & keep,
                of_ct_mark=first.of_ct_mark & keep,
                value=first.value & keep | (second if sign == "|" else 0),
            )
    return Change("", 0, 0, 0, certain=not (isinstance(value, dict) and "map" in value), known=False)


def _ranges(right: Any) -> tuple[tuple[int, int], ...]:
    """Numbers and ranges of them; empty if there is anything else among them."""
    elements = right["set"] if isinstance(right, dict) and "set" in right else [right]
    found = []
    for element in elements:
        if isinstance(element, dict) and "range" in element and all(isinstance(end, int) for end in element["range"]):
            found.append((element["range"][0], element["range"][1]))
        elif isinstance(element, int):
            found.append((element, element))
        else:
            return ()
    return tuple(found)


def _words(right: Any) -> tuple[str, ...]:
    elements = right["set"] if isinstance(right, dict) and "set" in right else right
    return tuple(map(str, elements if isinstance(elements, list) else [elements]))
