"""Routers between the relay's host and the ends: a lab in which the network is more than two cables.

    client cr -- ne near cr -- rc relay rs -- sr far fe -- sr server
    10.81.11.2   .1    .1.2    .1.1     .2.1   .2.2    .1    10.81.12.2

The client's and the server's addresses in the lab are their new ones.
"""

import contextlib
from collections.abc import Iterator

from tproxy_relay.lab import Host, Lab

NARROW = 1400
"""Bytes of the packets that a narrow router passes on; those of the ends have 1500."""

_SETTINGS = {
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    # A test has more to be told of within a second than a router says.
    "net.ipv4.icmp_ratelimit": 0,
    "net.ipv6.icmp.ratelimit": 0,
}

_ROUTER = """\
link set lo up
link add {inner} type veth peer name {leaf} netns {end}
addr add 10.81.{net}.2/24 dev {leaf}
addr add fd81:{net}::2/64 dev {leaf} nodad
addr add 10.81.{far}.1/24 dev {inner}
addr add fd81:{far}::1/64 dev {inner} nodad noprefixroute
link set {leaf} up
link set {inner} up
route add fd81:{far}::/64 dev {inner}
route add default via 10.81.{net}.1
route add ::/0 via fd81:{net}::1
"""

_END = """\
addr add 10.81.{far}.2/24 dev {leaf}
addr add fd81:{far}::2/64 dev {leaf} nodad
link set {leaf} up
route add default via 10.81.{far}.1
route add ::/0 via fd81:{far}::1
"""

_SILENT = """\
table inet silent {
  chain output {
    type filter hook output priority 0;
    icmp type { destination-unreachable, time-exceeded, parameter-problem } drop
    icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } drop
  }
}
"""


class Router:
    """One of them: what it passes on, and what it says of what it does not."""

    def __init__(self, lab: Lab, end: Host, net: int) -> None:
        """Stand between this end, whose network has that number, and the relay's host."""
        self._lab, self._net, self._far = lab, net, net + 10
        user = lab.user_namespace
        enter = [*(lab.relay.entrance() if user else []), "unshare", "-n", "--"]
        name, self._leaf = ("near", "cr") if net == 1 else ("far", "sr")
        self.host = Host(name, f"10.81.{net}.2", f"fd81:{net}::2", enter, user=user)
        self.host.await_ready()
        for setting, value in _SETTINGS.items():
            self.host.set_sysctl(setting, value)
        end.run(["ip", "link", "set", self._leaf, "netns", str(self.host.pid)])
        words = {"net": net, "far": self._far, "leaf": self._leaf, "inner": name[:2], "end": end.pid}
        # The name is free again in the end's own network, and taken in the router's.
        self.host.run(["ip", "-batch", "-"], input=_ROUTER.format(**words))
        end.run(["ip", "-batch", "-"], input=_END.format(**words))
        end.ipv4, end.ipv6 = f"10.81.{self._far}.2", f"fd81:{self._far}::2"
        routes = f"route add 10.81.{self._far}.0/24 via 10.81.{net}.2\n"
        routes += f"route add fd81:{self._far}::/64 via fd81:{net}::2\n"
        lab.relay.run(["ip", "-batch", "-"], input=routes)
        self._inner = name[:2]

    def narrow(self, mtu: int = NARROW) -> None:
        """Pass on, either way, no packets that are longer; say how long they may be."""
        ways = (
            f"10.81.{self._far}.0/24 dev {self._inner}",
            f"fd81:{self._far}::/64 dev {self._inner}",
            f"default via 10.81.{self._net}.1",
            f"::/0 via fd81:{self._net}::1",
        )
        lines = "".join(f"route replace {way} mtu lock {mtu}\n" for way in ways)
        self.host.run(["ip", "-batch", "-"], input=lines)

    def keep_silent(self, silent: bool = True) -> None:
        """Say nothing of what it does not pass on; or say it again."""
        self.host.run(["nft", "delete", "table", "inet", "silent"], check=False)
        if silent:
            self.host.run(["nft", "-f", "-"], input=_SILENT)


@contextlib.contextmanager
def routers(lab: Lab) -> Iterator[tuple[Router, Router]]:
    """The one before the client and the one before the server, for the rest of the lab's life."""
    with contextlib.ExitStack() as stack:
        pair = Router(lab, lab.client, 1), Router(lab, lab.server, 2)
        for one in pair:
            stack.callback(one.host.close)
        yield pair


def forget_paths(lab: Lab) -> None:
    """What the three hosts have learned of how long packets may be."""
    for host in lab.hosts:
        for family in ("-4", "-6"):
            host.run(["ip", family, "route", "flush", "cache"])
