"""Plans to test with: one of each kind, and any."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.settings import PortRange, Settings

STATES: tuple[State, ...] = ("active", "draining", "closed")

PORTS = (PortRange(443, 443), PortRange(8000, 8100))

PLAN = replace(
    plans.of_settings(Settings(intercept_inbound=PORTS, intercept_outbound=PORTS)), listen={4: "0.0.0.0", 6: "::"}
)
"""Both directions, both families, and all defaults."""

_REDIRECT = replace(PLAN, mode="redirect")

VARIANTS = {
    "tproxy": PLAN,
    "closed": replace(PLAN, on_failure="closed"),
    "inbound": replace(PLAN, outbound=()),
    "outbound": replace(PLAN, inbound=()),
    "interface": replace(PLAN, interface="a-b_c.d:1"),
    "IPv4": replace(PLAN, listen={4: "0.0.0.0"}),
    "IPv6": replace(PLAN, listen={6: "::"}),
    "loopback": replace(PLAN, listen={4: "127.0.0.1", 6: "::1"}),
    "addresses": replace(PLAN, listen={4: "192.0.2.1", 6: "2001:db8::1"}),
    "account": replace(PLAN, exempt_uid=4294967294),
    "mask": replace(PLAN, mark_mask=0x80000101),
    "address": replace(PLAN, preserve_source="address"),
    "full": replace(PLAN, preserve_source="full", on_failure="closed"),
    "beside nat": replace(PLAN, beside_nat=True),
    "many ports": replace(PLAN, inbound=tuple(PortRange(one, one + 5) for one in range(1, 641, 10))),
    "redirect": _REDIRECT,
    "redirect outbound": replace(_REDIRECT, inbound=()),
    "redirect addresses": replace(_REDIRECT, listen={4: "192.0.2.1", 6: "2001:db8::1"}, exempt_uid=1),
    "redirect loopback": replace(_REDIRECT, listen={4: "127.0.0.1", 6: "::1"}),
    "redirect full": replace(_REDIRECT, preserve_source="full", interface="eth0"),
}

_PORT = st.integers(1, 65535)
_RANGES = st.lists(st.tuples(_PORT, _PORT).map(sorted).map(lambda ends: PortRange(*ends)), max_size=9).map(tuple)
_BITS = st.lists(st.integers(0, 31), min_size=3, max_size=3, unique=True)

ANY = st.builds(
    Plan,
    mode=st.sampled_from(["tproxy", "redirect"]),
    inbound=_RANGES,
    outbound=_RANGES,
    inbound_port=_PORT,
    outbound_port=_PORT,
    listen=st.fixed_dictionaries({}, optional={4: st.ip_addresses(v=4).map(str), 6: st.ip_addresses(v=6).map(str)}),
    interface=st.none() | st.from_regex(r"[A-Za-z0-9_:-][A-Za-z0-9_.:-]{0,14}", fullmatch=True),
    preserve_source=st.sampled_from(["no", "address", "full"]),
    on_failure=st.sampled_from(["open", "closed"]),
    mark_mask=_BITS.map(lambda bits: sum(1 << bit for bit in bits)),
    route_table=st.integers(1, 252) | st.integers(256, 0xFFFFFFFF),
    route_priority=st.integers(1, 32763),
    exempt_uid=st.none() | st.integers(0, 0xFFFFFFFE),
    beside_nat=st.booleans(),
)


def quickly(cases, *quick):  # type: ignore[no-untyped-def]
    """For parametrize: these cases, of which all but the quick ones are slow."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def every_plan(test):  # type: ignore[no-untyped-def]
    """The test takes any `plan` and `state`."""
    some = settings(max_examples=40, deadline=None, database=None)
    return some(given(plan=ANY, state=st.sampled_from(STATES))(test))
