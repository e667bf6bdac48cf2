"""The plan for settings on this host, beside what others have there: the same for `run`, `rules` and `check`."""

from dataclasses import replace

from tproxy_relay.intercept import foreign_nat, foreign_routing, plan
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.settings import Settings


def for_host(settings: Settings) -> Plan:
    """The plan that these settings ask for, and that gets on with the NAT and the rules of routing of others. Raises
    ConfigError if `user` is not an account."""
    return beside_others(plan.of_settings(settings))


def beside_others(wanted: Plan) -> Plan:
    """That plan, as others on this host want it to be now."""
    takes = wanted.mode == "tproxy" and bool(wanted.inbound)
    return replace(
        wanted,
        beside_nat=takes and foreign_nat.rewrites_destinations(),
        route_priority=foreign_routing.priority(wanted),
    )


def why(former: Plan, later: Plan) -> str:
    """What others have done, so that the one plan has become the other one; '' if it was not that."""
    reasons = []
    if later.beside_nat != former.beside_nat:
        reasons.append(f"{'somebody' if later.beside_nat else 'nobody'} rewrites destinations of what arrives")
    if later.route_priority != former.route_priority:
        reasons.append(f"rules of routing of others: ours go from {former.route_priority} to {later.route_priority}")
    return "; ".join(reasons)
