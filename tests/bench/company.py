"""All relays that take part in a run, together on one stage."""

import contextlib
from collections.abc import Iterator, Sequence

from others import C, Envoy, Go, HAProxy, HAProxySplice, Python
from peers import Absent, Peer, Relay
from stage import Stage

KINDS: dict[str, type[Peer]] = {kind.name: kind for kind in (Relay, HAProxy, HAProxySplice, Envoy, Go, C, Python, Peer)}
USUAL = tuple(name for name in KINDS if name != Python.name)
"""Those that take part unless others are asked for: that one shows what is possible, and nobody uses it."""


class Company:
    """Those that are installed, running; and what the others want. In a `with`."""

    def __init__(self, stage: Stage, names: Sequence[str], options: Sequence[str] = ()) -> None:
        """`options` are lines for our configuration."""
        self.peers: list[Peer] = []
        self.versions: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        for number, name in enumerate(KINDS):
            if name not in names:
                continue
            peer = KINDS[name](stage, number, options if name == "relay" else ())
            try:
                self.versions[name] = peer.version()
            except Absent as what:
                self.absent[name] = str(what)
            else:
                self.peers.append(peer)

    def __enter__(self) -> "Company":
        with contextlib.ExitStack() as stack:
            for peer in self.peers:
                stack.callback(peer.stop)
                peer.run()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def in_turn(self, number: int) -> Iterator[Peer]:
        """Another one first in each round."""
        turn = number % len(self.peers)
        yield from self.peers[turn:] + self.peers[:turn]

    def warnings(self) -> list[str]:
        """In the log of our relay."""
        return [line for peer in self.peers if isinstance(peer, Relay) for line in peer.warnings()]
