"""Does somebody else on this host rewrite destinations? Docker, Kubernetes and port forwardings do, in nat prerouting.

Their rules come after TPROXY and would still change the address of a packet that has its socket by then, so that the
rest of its connection finds nobody. Where they are, intercepted connections are bound to the address they have, which
takes connection tracking; so it is done only there.
"""

import json

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import legacy_tables, nft_listing
from tproxy_relay.intercept.iptables_save import PREFIX
from tproxy_relay.intercept.nft import TABLE


def rewrites_destinations() -> bool:
    """True if there are nat rules for what arrives; False too if this account may not look."""
    return _in_nftables() or _in_legacy_iptables()


def _in_nftables() -> bool:
    try:
        entries = nft_listing.ruleset()
    except RelayError:
        return False
    chains = [entry["chain"] for entry in entries if "chain" in entry]
    every = {
        (one["family"], one["table"], one["name"])
        for one in chains
        if one.get("type") == "nat" and one.get("hook") == "prerouting" and one["table"] != TABLE
    }
    nat = set(every)  # but for those in which there is nothing but a rule of ours
    for entry in entries:
        rule = entry.get("rule")
        if rule and f'"{PREFIX}' in json.dumps(rule):
            nat.discard(_place(rule))
    theirs = (entry["rule"] for entry in entries if "rule" in entry and f'"{PREFIX}' not in json.dumps(entry))
    return bool(nat) or any(_place(rule) in every for rule in theirs)


def _place(rule: dict[str, str]) -> tuple[str, str, str]:
    return rule["family"], rule["table"], rule["chain"]


def _in_legacy_iptables() -> bool:
    families = legacy_tables.saved("-t", "nat", table="nat")
    return any(line.startswith("-A PREROUTING") and PREFIX not in line for lines in families for line in lines)
