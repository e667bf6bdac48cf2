"""`tproxy-relay check`, the doctor: what this host lacks, one line each, with the command that mends it.

finding.py                          what a line says
context.py  host.py  interfaces.py  what is examined, and the facts about it
tools.py  limits.py  sysctls.py     the programs, the limits, the settings of the kernel
redirects.py                        whether clients are told of a way around the relay
firewall.py  firewall_*.py          other people's rules, in one form, whether nft or iptables made them
foreign_rules.py  ruleset.py        who is in the way; what a former relay has left
plan_differences.py                 what a ruleset that is there was made for
journeys.py  foreign_packets.py     the ways of relayed packets, and what others do to them there
foreign_nat.py                      whose NAT comes before ours
kernel.py  selfprobe.py  namespace.py  trying it out: the ruleset, and a connection through it
background.py  __main__.py          the same for a running relay, in a process of its own
"""

import json
from collections.abc import Iterable, Iterator

from tproxy_relay.check import (
    foreign_nat,
    foreign_packets,
    foreign_rules,
    interfaces,
    kernel,
    limits,
    redirects,
    ruleset,
    selfprobe,
    sysctls,
    tools,
)
from tproxy_relay.check.context import Case, Probe
from tproxy_relay.check.finding import PROBLEM, Finding, ok, warning
from tproxy_relay.intercept import planning
from tproxy_relay.settings import Settings

PROBES: tuple[Probe, ...] = (
    tools.probe_capabilities,
    tools.probe_setpriv,
    tools.probe_ip,
    tools.probe_nft,
    tools.probe_iptables,
    kernel.probe_kernel,
    limits.probe_ports,
    limits.probe_ephemeral_ports,
    limits.probe_descriptors,
    limits.probe_threads,
    limits.probe_memory,
    limits.probe_backlog,
    limits.probe_conntrack,
    sysctls.probe_harmless,
    sysctls.probe_nonlocal_bind,
    sysctls.probe_path_mtu,
    sysctls.probe_idle_connections,
    sysctls.probe_loopback,
    sysctls.probe_interface,
    interfaces.probe_redirect_addresses,
    sysctls.probe_forwarding,
    sysctls.probe_bridges,
    sysctls.probe_vrf,
    redirects.probe_redirects,
    foreign_rules.probe_routing_table,
    foreign_rules.probe_rule_priority,
    foreign_rules.probe_marks,
    foreign_rules.probe_other_proxies,
    foreign_packets.probe_redirects,
    foreign_nat.probe_nat,
    foreign_packets.probe_filters,
    foreign_packets.probe_synproxy,
    foreign_packets.probe_lost_marks,
    foreign_packets.probe_tracking,
    foreign_rules.probe_masquerade,
    ruleset.probe_ruleset,
    selfprobe.probe_connections,
)
"""In the order of the lines."""

LOSE_NOTHING_NOW: frozenset[Probe] = frozenset(
    {sysctls.probe_nonlocal_bind, sysctls.probe_forwarding, foreign_rules.probe_masquerade}
)
"""Their problems are of another day, or of another kind: the connections of a running relay work."""


def run(settings: Settings, *, as_json: bool) -> int:
    """Examine this host and print the answers: 1 if there is a problem, else 0."""
    findings = list(examine(settings))
    healthy = not any(one.level == PROBLEM for one in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "findings": [one.as_json() for one in findings]}))
    else:
        print("\n".join(map(str, findings)))
    return 0 if healthy else 1


def examine(settings: Settings) -> Iterator[Finding]:
    """All findings. Raises ConfigError if `user` is not an account."""
    case = Case(settings, planning.for_host(settings))
    if not case.intercepts:
        yield ok("intercept", "nothing is to be intercepted: intercept-inbound and intercept-outbound are not set")
    yield from ask(case, PROBES)


def ask(case: Case, probes: Iterable[Probe]) -> Iterator[Finding]:
    """What these find, one after the other. What the self-probe meets is explained by what was found before."""
    cause: Finding | None = None
    for probe in probes:
        try:
            for found in probe(case):
                yield selfprobe.explained(found, cause)
                if probe not in LOSE_NOTHING_NOW:
                    cause = selfprobe.likelier(cause, found)
        except Exception as error:  # a fault in one, too, must not silence the others
            yield _not_examined(probe, error)


def _not_examined(probe: Probe, error: Exception) -> Finding:
    """Whatever a host refuses, and whatever a program answers that nobody has foreseen, is one line of the answer."""
    name = probe.__name__.removeprefix("probe_").replace("_", "-")
    return warning(name, f"{name} could not be tried ({str(error)[:200]})", "what is wrong there stays unknown")
