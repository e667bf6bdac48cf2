"""The lab itself: three hosts in a row, wired, addressed, routed; and the rules that put a relay in it.

    client cr ---------------- rc relay rs ---------------- sr server
    10.81.1.2            10.81.1.1 | 10.81.2.1              10.81.2.2
    fd81:1::2            fd81:1::1 | fd81:2::1              fd81:2::2

Nothing of it is visible on the machine, and nothing needs removing: see net/namespace_agent.py.
"""

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Literal

from tproxy_relay.intercept import nft, plan, routing
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.lab import needs
from tproxy_relay.lab.host import Host
from tproxy_relay.lab.needs import LabError
from tproxy_relay.lab.relay_process import RelayProcess
from tproxy_relay.settings import PortRange, Settings

Topology = Literal["gateway", "host", "local"]
"""gateway: client to server, forwarded by the relay's host. host: client to a server program on the relay's
host. local: a program on the relay's host to the server."""

_KNOWN_GROUND = {
    # A new namespace inherits the machine's IPv4 settings; tests want the same everywhere.
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.ipv4.conf.all.src_valid_mark": 0,
    "net.ipv4.conf.default.src_valid_mark": 0,
    "net.ipv6.conf.all.disable_ipv6": 0,
    "net.ipv6.conf.default.disable_ipv6": 0,
    # Addresses are ours alone: no second of waiting for duplicates of the link-local ones.
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.accept_ra": 0,
}

_FORWARDING = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}


class Lab:
    """Three hosts: `client`, `relay`, `server`. Use it in a `with`; it is built on entry and gone after it.

    Any number of labs live side by side, with the same addresses. As another user than root, or with
    `user_namespace`, everything is in a user namespace in which this user is root.
    """

    client: Host
    relay: Host
    server: Host

    def __init__(self, *, user_namespace: bool | None = None) -> None:
        self.user_namespace = not needs.privileged() if user_namespace is None else user_namespace
        self.relays: list[RelayProcess] = []
        """Every relay that was started here, in order, the ended ones too."""
        self._plan: Plan | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "Lab":
        needs.require_tools()
        try:
            self._start_hosts()
            self._wire()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise LabError(f"no network lab ({error}): it needs a writable /proc/sys") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all that runs in the lab, and the lab. May be called again."""
        for relay in self.relays:
            relay.kill()
        self._undo.close()

    @property
    def hosts(self) -> tuple[Host, Host, Host]:
        """The three hosts in a row: client, relay, server."""
        return (self.client, self.relay, self.server)

    def relay_address(self, family: int = socket.AF_INET) -> str:
        """The relay's address on the server's side: what a server sees of a relay that shows its own."""
        return "fd81:2::1" if family == socket.AF_INET6 else "10.81.2.1"

    def intercept(
        self,
        ports: Sequence[int | str] = ("8000-8999",),
        *,
        topology: Topology = "gateway",
        preserve_source: bool = False,
    ) -> None:
        """Steer new connections to these ports (`8000`, `8000-8999`) to the relay, instead of what was steered before:
        with the rules that the relay itself would install, held by nobody."""
        self.stop_intercepting()
        self._plan = _plan(tuple(map(_range, ports)), topology, preserve_source)
        for family in self._plan.families:
            self._ip(f"-{family}", routing.batch(self._plan))
        self.relay.run(["nft", "-f", "-"], input=nft.script(self._plan, "active"))

    def stop_intercepting(self) -> None:
        """Take the rules away; it is no error if there are none."""
        former, self._plan = self._plan, None
        if former is None:
            return
        self.relay.run(["nft", "-f", "-"], input=nft.removal())
        for family in former.families:
            self._ip(f"-{family}", routing.batch(former).replace(" add ", " del "), force=True)

    def relay_process(self, *options: str, wrapper: Sequence[str] = ()) -> RelayProcess:
        """The real relay, in the relay host, run with these options; to be used in a `with`."""
        relay = RelayProcess(self.relay, options, wrapper)
        self.relays.append(relay)
        return relay

    def report(self) -> str:
        """All that one wants to see when a test has failed."""
        commands = (["nft", "list", "ruleset"], ["ip", "-4", "rule"], ["ip", "-6", "rule"])
        parts = [self._output(self.relay, command) for command in commands]
        parts += [self._output(host, ["ss", "-tan"]) for host in self.hosts]
        parts += [f"--- log of the relay with {relay.options}\n{relay.log}" for relay in self.relays]
        return "\n".join(parts)

    def _output(self, host: Host, argv: Sequence[str]) -> str:
        done = host.run(argv, check=False)
        return f"--- {host.name}: {' '.join(argv)}\n{done.stdout}{done.stderr}"

    def _start_hosts(self) -> None:
        """The relay first: with a user namespace, it is the one that the other two enter."""
        user = self.user_namespace
        lead = ["unshare", *(["-U", "-r"] if user else []), "-n", "--"]
        self.relay = self._adopt(Host("relay", "10.81.1.1", "fd81:1::1", lead, user=user)).await_ready()
        follow = [*self.relay.entrance(), "unshare", "-n", "--"] if user else lead
        self.client = self._adopt(Host("client", "10.81.1.2", "fd81:1::2", follow, user=user))
        self.server = self._adopt(Host("server", "10.81.2.2", "fd81:2::2", follow, user=user))
        self.client.await_ready()
        self.server.await_ready()

    def _adopt(self, host: Host) -> Host:
        self._undo.callback(host.close)
        return host

    def _wire(self) -> None:
        for host in self.hosts:
            _settle(host)
        for name, value in _FORWARDING.items():
            self.relay.set_sysctl(name, value)
        links = _RELAY_LINKS.format(client=self.client.pid, server=self.server.pid)
        self.relay.run(["ip", "-batch", "-"], input=links)
        self.client.run(["ip", "-batch", "-"], input=_LEAF.format(dev="cr", net=1))
        self.server.run(["ip", "-batch", "-"], input=_LEAF.format(dev="sr", net=2))

    def _ip(self, family: str, lines: str, *, force: bool = False) -> None:
        argv = ["ip", family, *(["-force"] if force else []), "-batch", "-"]
        self.relay.run(argv, input=lines, check=not force)


def _plan(ports: tuple[PortRange, ...], topology: Topology, preserve_source: bool) -> Plan:
    """As the relay makes it from its settings, but for both families, whatever this machine has."""
    settings = Settings(
        intercept_inbound=() if topology == "local" else ports,
        intercept_outbound=ports if topology == "local" else (),
        preserve_source="address" if preserve_source else "no",
    )
    return replace(plan.of_settings(settings), listen={4: "0.0.0.0", 6: "::"})


def _range(ports: int | str) -> PortRange:
    first, _, last = str(ports).partition("-")
    return PortRange(int(first), int(last or first))


def _settle(host: Host) -> None:
    for name, value in _KNOWN_GROUND.items():
        host.set_sysctl(name, value)
    with contextlib.suppress(OSError):
        # The machine's own may be bbr, whose pacing timers cap what a veth pair carries.
        host.set_sysctl("net.ipv4.tcp_congestion_control", "reno")


_RELAY_LINKS = """\
link set lo up
link add rc type veth peer name cr netns {client}
link add rs type veth peer name sr netns {server}
addr add 10.81.1.1/24 dev rc
addr add fd81:1::1/64 dev rc nodad
addr add 10.81.2.1/24 dev rs
addr add fd81:2::1/64 dev rs nodad
link set rc up
link set rs up
"""

_LEAF = """\
link set lo up
addr add 10.81.{net}.2/24 dev {dev}
addr add fd81:{net}::2/64 dev {dev} nodad
link set {dev} up
route add default via 10.81.{net}.1
route add ::/0 via fd81:{net}::1
"""
