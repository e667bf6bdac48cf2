"""What the interfaces of this host are for the relay: with `mode redirect` those by which clients come in need an
address.
"""

from collections.abc import Iterator

from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, warning
from tproxy_relay.check.host import Interface
from tproxy_relay.intercept.plan import Family


def probe_redirect_addresses(case: Case) -> Iterator[Finding]:
    """The kernel gives what is redirected the address of the interface that it came in by, and drops it in silence
    where there is none (nf_nat_redirect.c)."""
    plan = case.plan
    if plan.mode != "redirect" or not plan.inbound:
        return
    found = False
    for family in plan.families:
        for one in case.host.interfaces:
            if one.has_any(family) or not _carries(case, one, family):
                continue
            found = True
            yield warning(
                f"redirect-ipv{family}",
                f"interface {one.name} has no IPv{family} address, and routes lead there",
                "what comes in by it is redirected to the address that it has: the kernel drops it, in silence",
                case.command(mode="tproxy"),
            )
            break
    if not found:
        yield ok("redirect", "each interface that clients come in by has an address")


def _carries(case: Case, one: Interface, family: Family) -> bool:
    """True if clients may come in by it: somebody is to be found there. Not by the ports of a bridge or a bond, nor by
    one that has only others on top of it."""
    if not one.up or one.master or one.name == "lo" or case.plan.interface not in (None, one.name):
        return False
    return any(route.get("dev") == one.name for route in case.host.routes(family, "main"))
