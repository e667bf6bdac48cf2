"""What is examined: the settings, the ruleset that they ask for, and this host."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from tproxy_relay.check import finding, firewall_iptables, firewall_nft, host
from tproxy_relay.check.finding import Finding
from tproxy_relay.check.firewall import Chain, Firewall
from tproxy_relay.check.host import Host
from tproxy_relay.intercept import backends, lock, nft
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.net import proc_net
from tproxy_relay.settings import Settings
from tproxy_relay.system import cpu


class Case:
    """What one run of the doctor is about: settings, the plan made of them, and the host."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.settings = settings
        self.plan = plan
        self.host = Host()

    @property
    def intercepts(self) -> bool:
        """True if a ruleset is asked for."""
        return bool(self.plan.inbound or self.plan.outbound)

    @property
    def workers(self) -> int:
        """How many processes would do the relaying."""
        return self.settings.workers or cpu.worth()

    @functools.cached_property
    def listener_ports(self) -> list[int]:
        """The ports that the ruleset sends connections to."""
        inbound = [self.plan.inbound_port] * bool(self.plan.inbound)
        return sorted({*inbound, *[self.plan.outbound_port] * bool(self.plan.outbound)})

    @functools.cached_property
    def holder(self) -> int | None:
        """The process that holds the ruleset, if there is one."""
        holder = lock.holder()
        return None if holder is None else holder.pid

    @functools.cached_property
    def backend(self) -> str:
        """The one that has rules of ours; without any, the one that these settings ask for."""
        there = [one.name for one in backends.present()]
        return there[0] if there else self.settings.backend.replace("auto", "nft")

    @functools.cached_property
    def relay_listens(self) -> bool:
        """True if a relay listens on the ports that the ruleset needs."""
        sockets = {one.local_port: one.inode for one in proc_net.tcp_sockets() if one.listening}
        wanted = self.listener_ports or list(self.settings.ports)
        return all(port in sockets and is_relay(host.owner(sockets[port])) for port in wanted)

    @functools.cached_property
    def firewall(self) -> Firewall:
        """The rules of everybody but a relay: those of nft, and those of each kind of iptables that is here."""
        tables: dict[str, dict[str, Chain]] = {}
        left_out = [("inet", nft.TABLE)]
        for program, saved in self.host.iptables_rules:
            read = firewall_iptables.chains(program, saved)
            tables.update(read)
            if not program.endswith("-legacy"):
                family = "ip6" if program.startswith("ip6") else "ip"
                left_out += [(family, name.split()[1]) for name in read]
        tables.update(firewall_nft.chains(self.host.nft_ruleset, left_out))
        return tables

    def command(self, words: str = "check", **changes: Any) -> str:
        """`tproxy-relay WORDS` with the settings of this case, changed so."""
        return finding.command(self.settings, words, **changes)


Probe = Callable[[Case], Iterable[Finding]]
"""A question to the host. RelayError comes out where the host refuses to answer."""


_NAMES = ("tproxy-relay", "tproxy_relay", "tproxy_relay.worker", "tproxy_relay.worker_process")
"""Its command, its module as in `python -m`, and that of its workers, now and in version 0.1.0.dev0 before the move."""


def is_relay(process: tuple[int, str] | None) -> bool:
    """True for the relay's own process; also for one that we may not look at."""
    # By the program's name, not by a folder that happens to be called so.
    return process is None or any(word.rpartition("/")[2] in _NAMES for word in process[1].split())
