"""What a client sees while other programs on the relay's host change marks, filter, translate and route: with and
without a relay.

What a case does to the host is the commands of its neighbour, as those who have reported it would have typed them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deadlines import PATIENCE
from interception import FAMILIES, PORT, ping, ways

from tproxy_relay.lab import Host, Lab

SHORT = 1.2
"""Seconds for a connection that nobody answers: the second SYN goes out after one."""

ANSWERED, RELAYED, LOST, RESET, REFUSED = "answered", "relayed", "timed out", "reset", "refused"


@dataclass(frozen=True)
class Neighbour:
    """What another program does on the relay's host, and to whom."""

    name: str
    how: tuple[str, ...]
    """Commands for a shell."""
    harms: tuple[str, ...] = ()
    """The ways in which connections suffer from it: gateway, host, local."""
    finding: str = ""
    """The name of what `check` finds."""
    options: tuple[str, ...] = ()
    """Of the relay."""
    keeps: str = ""
    """A command that shows that the neighbour's rule is still there after the remedy."""
    level: str = "problem"
    by_order: bool = False
    """True if it takes the right order of two chains, where the relay's rules are made with iptables."""
    sees: tuple[str, ...] = (LOST,)
    """What clients see instead: one of these."""


def chain(hook: str, *rules: str, policy: str = "accept", family: str = "inet") -> str:
    """The command that makes a table of somebody else's."""
    lines = "; ".join([f"type {hook}", f"policy {policy}", *rules, ""])
    return f"nft 'table {family} neighbour {{ chain c {{ {lines}}}; }}'"


def spoil(lab: Lab, how: Sequence[str]) -> None:
    """Do it. LabError if a command fails."""
    for line in how:
        lab.relay.run(["sh", "-c", line])


def seen(lab: Lab, way: str, family: str, timeout: float = PATIENCE) -> str:
    """What a client sees of a new connection and an exchange on it. `timeout` is for one that may be lost."""
    source, destination = ways(lab)[way]
    try:
        with source.connect(destination.address(FAMILIES[family]), PORT, timeout) as sock:
            fault = ping(sock)
            if fault:
                return RESET if "Reset" in fault else LOST if "imeout" in fault else fault
            return RELAYED if _taken(lab.relay, sock.getsockname()[1]) else ANSWERED
    except ConnectionRefusedError:
        return REFUSED
    except ConnectionError:
        return RESET
    except TimeoutError:
        return LOST


def _taken(relay: Host, port: int) -> bool:
    """True if a socket of the relay's host has come from that port: where no server is there, it is the relay's."""
    said = relay.run(["ss", "-tnH", f"dport = {port}"]).stdout
    return bool(said.strip())
