"""A router with one arm: clients, itself and the way out are in one network, and it tells clients of the shorter way.

Packets that the relay takes are not forwarded, so nothing is said for them; but one packet of anything else to the same
address is enough (ICMP redirect, RFC 792), and the client's next connections pass the relay by.
"""

from collections.abc import Iterator

from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, set_sysctl, warning
from tproxy_relay.check.host import number, of_interface
from tproxy_relay.net import proc_net


def probe_redirects(case: Case) -> Iterator[Finding]:
    """Nothing where clients come in by one interface and leave by another, and where nothing is forwarded."""
    arm = _only_arm(case)
    if arm is None or not _serves_elsewhere(case) or number(of_interface(4, arm, "forwarding")) != 1:
        return
    # The kernel takes the greater of the two (ip-sysctl.rst, send_redirects). IPv6 has no such setting.
    names = [of_interface(4, name, "send_redirects") for name in ("all", arm)]
    talks = [name for name in names if number(name)]
    if talks:
        yield warning(
            "redirects",
            f"{talks[0]} is 1, and clients come in and go out by {arm}",
            "this host tells them of a shorter way as soon as it has forwarded anything for them, and their next "
            "connections are not relayed",
            " && ".join(set_sysctl(name, 0) for name in talks),
        )
    else:
        yield ok("redirects", f"clients that come in and go out by {arm} are not told of a shorter way")


def _only_arm(case: Case) -> str | None:
    """The interface by which clients come, if it is also the one to everywhere else."""
    if not case.plan.inbound or 4 not in case.plan.families:
        return None
    routes = case.host.routes(4, "main")
    leading = {str(one.get("dev")) for one in routes}  # those without an address, too
    outside = [one for one in case.host.interfaces if one.name != "lo" and one.up and not one.master]
    arms = [one.name for one in outside if one.has(4) or one.name in leading]
    onwards = {str(one.get("dev")) for one in routes if one.get("dst") == "default"}
    if len(arms) == 1:
        onwards = set(arms)
    elif case.plan.interface is None:
        return None  # by which of them clients come is not known
    arm = case.plan.interface or arms[0]
    return arm if arm in arms and onwards == {arm} else None


def _serves_elsewhere(case: Case) -> bool:
    served = {one.local_port for one in proc_net.tcp_sockets() if one.listening}
    return any(not served.intersection(range(ports.first, ports.last + 1)) for ports in case.plan.inbound)
