"""What a ruleset that is there was made for, and in what that differs from the plan that these settings ask for.

Rules carry no more than the digest of their plan. So the plans are tried that a relay on this host could have made a
while ago, or with other settings, until one has that digest.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, get_args

from tproxy_relay.check import host
from tproxy_relay.intercept import backends, routing
from tproxy_relay.intercept.plan import Family, Plan
from tproxy_relay.settings import Mode, OnFailure, PreserveSource

_DIGEST = re.compile(r"\bplan ([0-9a-f]{8})\b")


class Difference(NamedTuple):
    """One thing in which they differ."""

    option: str
    """The setting, in its spelling; '' for what the host has become since."""
    words: str
    harmless: bool = False
    """True for rules that are of no use on this host any more, and in nobody's way."""


def found(wanted: Plan) -> list[Difference] | None:
    """In what the plan of the rules that are there differs from this one; None if it is not known."""
    former = there(wanted)
    return None if former is None else list(_between(former, wanted))


def there(wanted: Plan) -> Plan | None:
    """The plan of the rules that are there, if it is not too far from this one; else None."""
    digest = digest_there()
    return None if digest is None else next((one for one in _candidates(wanted) if one.digest == digest), None)


def digest_there() -> str | None:
    """That of the rules that the kernel has; None without any."""
    for where in backends.present():
        for label in itertools.chain.from_iterable(where.labels().values()):
            if match := _DIGEST.search(label):
                return match[1]
    return None


def _candidates(wanted: Plan) -> Iterator[Plan]:
    """From near to far: the host may have changed; then one setting may have, then several."""
    numbers = _numbers_there()
    of_host: list[dict[str, Any]] = [
        {"beside_nat": beside_nat, "listen": listen, "route_priority": priority}
        for beside_nat in (wanted.beside_nat, not wanted.beside_nat)
        for listen in _listens(wanted)
        for priority in dict.fromkeys([wanted.route_priority, *numbers["route_priority"]])
    ]
    settings: dict[str, list[Any]] = {
        "mode": [*get_args(Mode)],
        "on_failure": [*get_args(OnFailure)],
        "preserve_source": [*get_args(PreserveSource)],
        "interface": [wanted.interface, None],
        "exempt_uid": [wanted.exempt_uid, None],
        "inbound": [wanted.inbound, wanted.outbound, ()],
        "outbound": [wanted.outbound, wanted.inbound, ()],
        "route_table": [wanted.route_table, *numbers["route_table"]],
        "mark_mask": [wanted.mark_mask, *numbers["mark_mask"]],
    }
    for several in range(3):
        for names in itertools.combinations(settings, several):
            choices = [[one for one in settings[name] if one != getattr(wanted, name)] for name in names]
            for values in itertools.product(*choices):
                for facts in of_host:
                    yield replace(wanted, **facts, **dict(zip(names, values)))


def _listens(wanted: Plan) -> Iterator[dict[Family, str]]:
    """With either family, or both."""
    both: dict[Family, str] = {4: "0.0.0.0", 6: "::", **wanted.listen}
    yield dict(wanted.listen)
    for families in ((4, 6), (4,), (6,)):
        yield {family: both[family] for family in families if family in both}


def _numbers_there() -> dict[str, list[int]]:
    """Those that our rules of routing have."""
    rules = [
        one
        for family in ("-4", "-6")
        for one in host.ask("ip", "-N", "-json", family, "rule", "show")
        if one.get("protocol") == str(routing.PROTOCOL)
    ]
    return {
        "route_priority": sorted({int(one["priority"]) for one in rules})[:1],
        "route_table": sorted({int(one["table"]) for one in rules if str(one.get("table", "")).isdigit()}),
        "mark_mask": sorted({int(str(one["fwmask"]), 0) for one in rules if "fwmask" in one}),
    }


def _between(former: Plan, wanted: Plan) -> Iterator[Difference]:
    for family in sorted({*former.families, *wanted.families}):
        if family not in former.families:
            yield Difference("", f"IPv{family} has come to this host since, and is not intercepted")
        elif family not in wanted.families:
            yield Difference("", f"IPv{family} is intercepted, and this host has none now", harmless=True)
    if wanted.beside_nat and not former.beside_nat:
        yield Difference("", "somebody rewrites destinations since (NAT: Docker, Kubernetes, a port forwarding)")
    elif former.beside_nat and not wanted.beside_nat:
        yield Difference("", "nobody rewrites destinations any more (NAT)", harmless=True)
    if former.route_priority != wanted.route_priority:
        yield Difference("", f"its rules of routing stand at {former.route_priority}, not at {wanted.route_priority}")
    for name, option in _OPTIONS.items():
        there, asked = getattr(former, name), getattr(wanted, name)
        if there != asked:
            yield Difference(option, f"{option} is {_shown(name, there)} there, not {_shown(name, asked)}")


_OPTIONS = {
    "mode": "mode",
    "on_failure": "on-failure",
    "preserve_source": "preserve-source",
    "interface": "interface",
    "exempt_uid": "user",
    "inbound": "intercept-inbound",
    "outbound": "intercept-outbound",
    "route_table": "route-table",
    "mark_mask": "mark-mask",
}
"""The fields of a plan, and the settings that they come from."""


def _shown(name: str, value: Any) -> str:
    if name == "mark_mask":
        return f"{value:#010x}"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "nothing"
    return "not set" if value is None else str(value)
