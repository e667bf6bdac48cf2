"""Random schedules of what both ends of a connection do, many at once, over the real relay.

    python tests/faults/schedules.py --count 10000 [--seed N]      so many schedules; what became of them
    python tests/faults/schedules.py --seed N --only 17 [18 ...]   these again

Each end sends pieces of random sizes, rests, is deaf for a while, half-closes, resets, in any order. Whatever they
do, what arrives is the beginning of what was sent, an EOF comes only after all of it, and the relay's record agrees.
One thread and one epoll drive all of them. Each connection has a port of the server to itself while it lasts, so that
the two ends find each other without a byte.
"""

import argparse
import collections
import heapq
import os
import random
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from scripted_end import ScriptedEnd, Step, schedule

from tproxy_relay.lab import Lab, Line, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

FIRST_PORT, AT_ONCE = 8000, 100
FAMILIES = (socket.AF_INET, socket.AF_INET6)
OPTIONS = ("--workers", "2", "--log-level", "info", "--keepalive", "1")
"""An end that resets after both FINs sends no reset if its last segments are under way, even if they are dropped then
(tcp_disconnect() in net/ipv4/tcp.c). It just vanishes, and only keepalive shows that."""
RELAYS: tuple[tuple[str, ...], ...] = ((), ("--socket-buffer", "16384"))
"""Every second schedule meets a relay with small buffers, which are full whenever an end is deaf."""
PATIENCE = 30.0
"""Seconds after which a schedule that is not over has failed. The longest of them rests for a second or two."""
_IN = select.EPOLLIN

Plans = Callable[[random.Random], tuple[list[Step], list[Step]]]
"""What a client and its server do."""


@dataclass
class Pair:
    """One schedule, and its two ends."""

    number: int
    port: int
    family: int
    client: ScriptedEnd
    server: ScriptedEnd
    name: str = ""
    """The client's address and port, as the relay writes them."""
    accepted: bool = False
    record: Line | None = None
    began: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        """Both ends have done all they wanted or could, and the relay has told of it."""
        if self.record is None or not self.client.over:
            return False
        return self.server.over if self.accepted else "upstream_local" not in self.record

    def faults(self) -> list[str]:
        """What must not be."""
        found = [*self._stream("up", self.client, self.server), *self._stream("down", self.server, self.client)]
        assert self.record is not None
        if self.record["outcome"] not in self._outcomes():
            found.append(f"outcome {self.record['outcome']}, not one of {sorted(self._outcomes())}")
        return found

    def _stream(self, way: str, sender: ScriptedEnd, reader: ScriptedEnd) -> list[str]:
        assert self.record is not None
        passed, found = self.record[f"bytes_{way}"], list(reader.faults)
        if not reader.got <= passed <= sender.sent:
            found.append(f"{way}: {sender.sent} sent, {passed} recorded, {reader.got} arrived")
        if reader.saw == "EOF" and not (sender.finished and reader.got == sender.sent == passed):
            found.append(f"{way}: EOF after {reader.got} of {sender.sent} bytes, {passed} recorded")
        nobody = not (sender.reset or reader.reset)
        if nobody and (reader.saw != "EOF" or reader.broke or sender.sent != sender.planned):
            found.append(f"{way}: nobody reset it, but it did not end well")
        return found

    def _outcomes(self) -> set[str]:
        possible = {"client-reset"} if self.client.reset else set()
        if self.server.reset:
            possible.add("upstream-reset")
        if not possible or (self.client.finished and self.server.finished):
            possible.add("completed")  # both FINs may have been through before the reset
        return possible

    def __str__(self) -> str:
        return f"schedule {self.number}, {self.name}: client {self.client}; server {self.server}; {self.record}"


def random_plans(dice: random.Random) -> tuple[list[Step], list[Step]]:
    """Two that know nothing of each other."""
    return schedule(dice), schedule(dice)


class Run:
    """Schedules, some at a time, each from its own seed."""

    def __init__(self, lab: Lab, relay: RelayProcess, seed: int, plans: Plans = random_plans) -> None:
        self.seed = seed
        self.free = list(range(FIRST_PORT, FIRST_PORT + AT_ONCE))
        """Ports of the server that nobody uses."""
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self._lab, self._relay, self._plans = lab, relay, plans
        self._poll = select.epoll()
        self._pairs: dict[int, Pair] = {}
        """By the server's port."""
        self._ends: dict[int, ScriptedEnd] = {}
        self._due: list[tuple[float, int, ScriptedEnd]] = []
        self._records: collections.deque[Line] = collections.deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll.register(self._bell, _IN)
        self._listeners: dict[int, socket.socket] = {}
        for family in FAMILIES:
            for port in range(FIRST_PORT, FIRST_PORT + AT_ONCE):
                listener = lab.server.listen(port, family)
                listener.setblocking(False)
                self._listeners[listener.fileno()] = listener
                self._poll.register(listener, _IN)
        self._reader = threading.Thread(target=self._follow, name="records", daemon=True)

    def __enter__(self) -> "Run":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends.values():
            end.close()
        for listener in self._listeners.values():
            listener.close()
        self._poll.close()
        self._relay.kill()  # the log ends with it, and so does the reader
        self._reader.join(PATIENCE)
        os.close(self._bell)

    def play(self, numbers: list[int]) -> None:
        """All of these. AssertionError with the seed and all that was seen if one of them is not as it must be."""
        waiting = collections.deque(numbers)
        while waiting or self.live:
            while waiting and self.free:
                self.begin(waiting.popleft())
            self.turn()

    @property
    def live(self) -> int:
        """Those that are not over."""
        return len(self._pairs)

    def turn(self, patience: float = 1.0) -> None:
        """Let everybody do what he can, once; wait so long for something to happen. AssertionError as above."""
        self._listen(patience)
        for pair in [pair for pair in self._pairs.values() if pair.over()]:
            self._check(pair, pair.faults())
            del self._pairs[pair.port]
            self.free.append(pair.port)
        now = time.monotonic()
        for pair in self._pairs.values():
            if now - pair.began > PATIENCE:
                self._check(pair, [f"not over after {PATIENCE:g} s"])

    def hear(self, record: Line) -> None:
        """The relay has told of a connection. In any thread."""
        self._records.append(record)
        os.eventfd_write(self._bell, 1)

    def begin(self, number: int) -> None:
        """One more, if a port is free."""
        port = self.free.pop(0)
        dice = random.Random(f"{self.seed} {number}")
        family = dice.choice(FAMILIES)
        sock = self._lab.client.socket(family)
        sock.setblocking(False)
        up, down = self._plans(dice)
        pair = Pair(number, port, family, ScriptedEnd(up, dice), ScriptedEnd(down, dice))
        pair.client.expect(pair.server)
        pair.server.expect(pair.client)
        self._pairs[port] = pair
        sock.connect_ex((self._lab.server.address(family), port))
        pair.name = str(from_sockaddr(sock.getsockname()))
        self._enter(pair.client, sock)

    def _enter(self, end: ScriptedEnd, sock: socket.socket) -> None:
        end.enter(sock)
        self._ends[sock.fileno()] = end
        self._poll.register(sock, end.wants())

    def _listen(self, patience: float) -> None:
        if self._due:
            patience = max(0.0, min(patience, self._due[0][0] - time.monotonic()))
        for fd, _ in self._poll.poll(patience):
            if fd in self._ends:
                self._act(self._ends[fd])
            elif fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd == self._bell:
                os.eventfd_read(self._bell)
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, end = heapq.heappop(self._due)
            if not end.over:
                self._wake(end)
        while self._records:
            self._note(self._records.popleft())

    def _wake(self, end: ScriptedEnd) -> None:
        was_deaf = end.deaf
        end.wake()
        if was_deaf:
            self._poll.register(end.sock, end.wants())
        self._act(end)

    def _act(self, end: ScriptedEnd) -> None:
        fd, pause = end.sock.fileno(), end.paused_until
        end.step()
        if end.over:
            del self._ends[fd]
            end.close()  # which takes it out of the epoll, too
            return
        if end.paused_until != pause:
            assert end.paused_until is not None
            heapq.heappush(self._due, (end.paused_until, fd, end))
        if end.deaf:
            self._poll.unregister(fd)  # a dead socket would wake us all the time, whatever we ask for
        else:
            self._poll.modify(fd, end.wants())

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except BlockingIOError:
            return
        pair = self._pairs[listener.getsockname()[1]]
        self._check(pair, ["a second connection came to the server"] if pair.accepted else [])
        intercepted = peer[0] == self._lab.relay_address(pair.family)
        self._check(pair, [] if intercepted else [f"{peer[0]} came to the server, not the relay"])
        pair.accepted = True
        sock.setblocking(False)
        self._enter(pair.server, sock)

    def _follow(self) -> None:
        for line in self._relay.follow():
            if line.get("message") == "connection closed":
                self.hear(line)

    def _note(self, record: Line) -> None:
        pair = self._pairs[int(record["orig_dst"].rpartition(":")[2])]
        self._check(pair, [] if record["client"] == pair.name else [f"the record is {record['client']}'s"])
        pair.record = record
        self.outcomes[record["outcome"]] += 1
        self.bytes += record["bytes_up"] + record["bytes_down"]

    def _check(self, pair: Pair, faults: list[str]) -> None:
        again = f"again: python tests/faults/schedules.py --seed {self.seed} --only {pair.number}"
        assert not faults, "\n".join([*faults, str(pair), again])


def main(arguments: list[str]) -> int:
    """The script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of some schedules of that seed")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}", flush=True)
    began = time.monotonic()
    numbers = chosen.only or list(range(chosen.count))
    with Lab() as lab:
        outcomes, size = play_all(lab, chosen.seed, numbers)
    seconds = time.monotonic() - began
    print(f"{len(numbers)} schedules, {size / 1e6:.0f} MB, in {seconds:.0f} s: {dict(outcomes)}")
    return 0


def play_all(lab: Lab, seed: int, numbers: list[int]) -> tuple[collections.Counter[str], int]:
    """These schedules of that seed; how the relay says that they ended, and the bytes that it has passed on."""
    outcomes, size = collections.Counter[str](), 0
    lab.intercept((f"{FIRST_PORT}-{FIRST_PORT + AT_ONCE - 1}",))
    for kind, options in enumerate(RELAYS):
        ours = [number for number in numbers if number % len(RELAYS) == kind]
        with lab.relay_process(*OPTIONS, *options) as relay, Run(lab, relay, seed) as run:
            run.play(ours)
            relay.stop()
        wrong = [line for line in relay.lines() if line["levelname"] not in ("DEBUG", "INFO")]
        assert not wrong, wrong[:5]
        outcomes += run.outcomes
        size += run.bytes
    return outcomes, size


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
