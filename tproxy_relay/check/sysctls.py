"""Settings of the kernel, and of interfaces, that break interception; and those that are said to and do not."""

from collections.abc import Iterator

from tproxy_relay.check import host
from tproxy_relay.check.context import Case
from tproxy_relay.check.finding import Finding, ok, problem, set_link, set_sysctl, warning
from tproxy_relay.check.host import number, of_interface
from tproxy_relay.intercept.plan import Family
from tproxy_relay.net import proc_net

HARMLESS = ("rp_filter", "src_valid_mark", "tcp_fwmark_accept", "fwmark_reflect")
"""The usual recipes fail with these: their rules of routing match by mark alone (intercept/routing.py)."""

_TABLES = {4: "iptables", 6: "ip6tables"}
"""As the settings of bridges call the families."""

_CONNTRACK_TIMEOUT = 432_000
"""Seconds: the kernel's own (nf_conntrack_proto_tcp.c, five days)."""


def probe_harmless(case: Case) -> Iterator[Finding]:
    """Strict values that other recipes want changed."""
    if not (case.intercepts and case.plan.needs_routing):
        return
    strict = [name for name in HARMLESS if _strict(name, case)]
    if strict:
        yield ok("strict-sysctls", f"{', '.join(strict)} on, and the ruleset works with that")
    else:
        yield ok("strict-sysctls", f"{', '.join(HARMLESS)} are off")


def probe_nonlocal_bind(case: Case) -> Iterator[Finding]:
    """With ip_nonlocal_bind the usual way to know this host's own addresses fails."""
    for family in case.plan.families:
        name = f"net.ipv{family}.ip_nonlocal_bind"
        if host.number(name) != 1:
            continue
        why = "own addresses are hard to tell: of several in the same network, all but the first count as others'"
        yield problem("nonlocal-bind", f"{name} is 1", why, set_sysctl(name, 0))


def probe_path_mtu(_: Case) -> Iterator[Finding]:
    """Both sides of each connection end here: this host must find out how long packets may be, where nobody says so."""
    name = "net.ipv4.tcp_mtu_probing"  # of IPv6, too (tcp_timer.c)
    if number(name) == 0:
        why = "where a narrow path swallows long packets, and the ICMP errors that say so, large transfers hang"
        yield warning("path-mtu", f"{name} is 0", why, set_sysctl(name, 1))
    else:
        yield ok("path-mtu", "paths that swallow long packets are found out")


def probe_idle_connections(case: Case) -> Iterator[Finding]:
    """What conntrack has forgotten of an idle connection goes direct, or is reset; the relay's probes renew it."""
    name = "net.netfilter.nf_conntrack_tcp_timeout_established"
    seconds, keepalive = number(name), case.settings.keepalive
    if seconds is None or not (case.plan.outbound or (case.intercepts and case.plan.mode == "redirect")):
        return
    if keepalive and seconds <= keepalive:
        what = f"{name} is {seconds}, and keepalive is {keepalive}"
        why = "conntrack forgets idle connections before the relay's first probe renews them, and they end"
        yield warning("conntrack-timeout", what, why, set_sysctl(name, _CONNTRACK_TIMEOUT))
    else:
        yield ok("conntrack-timeout", f"conntrack remembers idle connections for {seconds} s")


def probe_loopback(case: Case) -> Iterator[Finding]:
    """Intercepted packets are routed to lo, which must be up, for each family."""
    if not (case.intercepts and case.plan.needs_routing):
        return
    lo = next((one for one in case.host.interfaces if one.name == "lo"), None)
    if lo is None or not lo.up:
        yield problem("lo", "interface lo is down", "intercepted packets are routed to it", "ip link set lo up")
        return
    name = "net.ipv6.conf.lo.disable_ipv6"
    has_ipv6 = any(one.has_any(6) for one in case.host.interfaces if one.name != "lo")
    if 6 in case.plan.families and has_ipv6 and number(name) == 1:
        yield problem(
            "lo", f"{name} is 1, and this host has IPv6", "intercepted packets are routed to lo", set_sysctl(name, 0)
        )
        return
    yield ok("lo", "interface lo is up")


def probe_interface(case: Case) -> Iterator[Finding]:
    """The one interface that is listened on, if there is one."""
    name = case.settings.interface
    for interface in case.host.interfaces if name else ():
        if interface.name == name and not interface.up:
            yield problem("interface", f"interface {name} is down", "nothing arrives there", set_link(name, "up"))


def probe_forwarding(case: Case) -> Iterator[Finding]:
    """A gateway must forward what the relay does not take: while it stops, and when it is dead."""
    plan = case.plan
    if not plan.inbound or plan.on_failure != "open":
        return
    served = {one.local_port for one in proc_net.tcp_sockets() if one.listening}
    elsewhere = [ports for ports in plan.inbound if not served.intersection(range(ports.first, ports.last + 1))]
    outside = [one for one in case.host.interfaces if one.name != "lo" and one.up and not one.master]
    why = (
        f"nobody here serves port {', '.join(map(str, elsewhere))}, so the servers are behind this host; when the "
        "relay stops or dies, connections to them go nowhere"
    )
    for family in plan.families:
        ways = [one.name for one in outside if one.has(family)]
        if not elsewhere or len(ways) < 2:
            continue
        switch = "net.ipv4.ip_forward" if family == 4 else "net.ipv6.conf.all.forwarding"
        each = [of_interface(family, name, "forwarding") for name in ways] if family == 4 else []
        off = [name for name in (switch, *each) if number(name) == 0]
        if off:
            yield problem(
                f"forwarding-ipv{family}",
                f"{off[0]} is 0",
                why,
                set_sysctl(switch, 1) if off[0] == switch else " && ".join(set_sysctl(name, 1) for name in off),
            )
        else:
            yield ok(f"forwarding-ipv{family}", f"IPv{family} is forwarded when the relay is not there")


def probe_bridges(case: Case) -> Iterator[Finding]:
    """br_netfilter takes packets through the rules while they are still in a bridge; TPROXY then loses them. Where
    Docker or Kubernetes have switched it on, clients mostly come by something else, and it is to stay so."""
    if not case.plan.inbound or case.plan.mode != "tproxy":
        return
    bridges = [one for one in case.host.interfaces if one.kind == "bridge"]
    concerned = [one for one in bridges if case.plan.interface in (None, one.name)]
    if not concerned:
        return
    found = False
    for family in case.plan.families:
        switch, attribute = f"net.bridge.bridge-nf-call-{_TABLES[family]}", f"nf_call_{_TABLES[family]}"
        on, entries = number(switch) == 1, _entries(case, family)
        caught = [one.name for one in concerned if on or one.bridge.get(attribute)]
        ours = [name for name in caught if name in entries]
        if not caught:
            continue
        found = True
        names = ", ".join(ours or caught)
        what = f"{switch} is 1" if on else f"bridge {names} has {attribute} 1"
        why = f"IPv{family} connections that come in by bridge {names} are lost or refused"
        if ours:
            wrong = [one.name for one in bridges if one.name in ours and one.bridge.get(attribute)]
            rest = [one.name for one in bridges if one.name not in ours] if on else []
            mend = [set_sysctl(switch, 0)] if on else []
            mend += [set_link(name, f"type bridge {attribute} 0") for name in wrong]
            mend += [set_link(name, f"type bridge {attribute} 1") for name in rest]
            yield problem(f"bridge-ipv{family}", what, why, " && ".join(mend))
        else:
            others = [name for name in entries if name not in caught]
            yield warning(f"bridge-ipv{family}", what, why, case.command(interface=others[0]) if others else "")
    if not found:
        yield ok("bridge", f"bridge {', '.join(one.name for one in concerned)}: packets in it do not meet the rules")


def _entries(case: Case, family: Family) -> list[str]:
    """The interfaces by which clients are known to come: the one that is listened on, or those to everywhere else."""
    if case.plan.interface:
        return [case.plan.interface]
    return [str(one.get("dev")) for one in case.host.routes(family, "main") if one.get("dst") == "default"]


def probe_vrf(case: Case) -> Iterator[Finding]:
    """A listener hears what comes in by a VRF's interfaces only if it is told so."""
    vrfs = [one.name for one in case.host.interfaces if one.kind == "vrf"]
    if case.plan.inbound and vrfs and number("net.ipv4.tcp_l3mdev_accept") == 0:
        yield warning(
            "vrf",
            f"net.ipv4.tcp_l3mdev_accept is 0, and there is a VRF ({', '.join(vrfs)})",
            "what comes in by its interfaces is not relayed",
            set_sysctl("net.ipv4.tcp_l3mdev_accept", 1),
        )


def _strict(name: str, case: Case) -> bool:
    plain = number(f"net.ipv4.{name}")
    if plain is not None:
        return plain != 0
    names = ["all", *(one.name for one in case.host.interfaces)]
    return any(number(of_interface(4, one, name)) for one in names)
