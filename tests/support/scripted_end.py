"""One end of a connection that follows a plan, and what it saw of the other end. It never blocks."""

import errno
import os
import random
import select
import socket
import struct
import time

BLOCK = 65536
ROUND = 4 << 20
STREAM = random.Random(7).randbytes(ROUND)
STREAM += STREAM[:BLOCK]
"""What everybody sends is this, from a place of his own on, round and round."""
MOST = 19
"""Powers of two: a piece has up to 512 KiB."""
PIECES = (0, 1, 1, 2, 3, 5)
PAUSES = (*(0.001, 0.01, 0.05) * 10, 1.5)
"""Seconds in the middle; the last one is longer than what a send() of the relay waits for room."""

Step = tuple[str, float]
"""send so many bytes; await so many, or the end; rest or be deaf so many seconds; finish (our FIN); reset."""


def schedule(dice: random.Random) -> list[Step]:
    """What to do, in order. In the end a half-close, a reset, or one after the other."""
    steps: list[Step] = []
    for _ in range(dice.choice(PIECES)):
        steps.append(("send", int(2 ** dice.uniform(0, MOST))))
        if dice.random() < 0.4:
            steps.append(_pause(dice))
    ending = dice.random()
    if ending < 0.75:
        steps.append(("finish", 0))
    if ending > 0.65:
        if dice.random() < 0.7:
            steps.append(_pause(dice))
        steps.append(("reset", 0))
    return steps


def _pause(dice: random.Random) -> Step:
    # Who rests still reads. Who is deaf does not, and what comes fills the buffers meanwhile.
    return (dice.choice(("rest", "deaf")), 2 * dice.random() * dice.choice(PAUSES))


class ScriptedEnd:
    """`sent` and `got` are bytes. `saw` is how the peer's stream ended for us: EOF, or the name of an error. `broke` is
    the error that ended all."""

    def __init__(self, plan: list[Step], dice: random.Random) -> None:
        self.plan = plan
        self.planned = int(sum(amount for verb, amount in self.plan if verb == "send"))
        self.sent = self.got = 0
        self.finished = self.reset = self.over = False
        self.saw: str | None = None
        self.broke: str | None = None
        self.paused_until: float | None = None
        self.deaf = False
        self.faults: list[str] = []
        self._steps = self.plan[::-1]
        self._buffer = dice.choice((0, 0, 0, 4096, 65536))
        self._place = dice.randrange(ROUND)
        self._peer_place = 0
        self._unsent = 0
        self._connected = False
        self._sock: socket.socket | None = None

    def __str__(self) -> str:
        did = "finished, " * self.finished + "reset, " * self.reset
        plan = ", ".join(f"{verb} {amount:g}" if amount else verb for verb, amount in self.plan)
        return f"sent {self.sent}, got {self.got}, {did}saw {self.saw}, broke {self.broke} ({plan})"

    def expect(self, peer: "ScriptedEnd") -> None:
        """What comes will come from there."""
        self._peer_place = peer._place

    def enter(self, sock: socket.socket) -> None:
        """This is our socket; it may still be connecting."""
        self._sock = sock
        if self._buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)

    @property
    def sock(self) -> socket.socket:
        assert self._sock is not None
        return self._sock

    def close(self) -> None:
        """Leave."""
        if self._sock is not None:
            self._sock.close()

    def wants(self) -> int:
        """The events to be told of."""
        reading = select.EPOLLIN if self.saw is None else 0
        writing = not self._connected or (self._unsent and self.paused_until is None)
        return reading | (select.EPOLLOUT if writing else 0)

    def wake(self) -> None:
        """The pause is over."""
        self.paused_until, self.deaf = None, False

    def step(self) -> None:
        """Whatever the socket allows, as far as the next pause."""
        try:
            self._connect()
            if self._connected:
                self._read()
                self._go_on()
        except OSError as error:
            self._broken(error)
        if self.finished and self.saw == "EOF" and not self._steps and self.paused_until is None:
            self.over = True

    def _connect(self) -> None:
        if not self._connected:
            if code := self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            try:
                self.sock.getpeername()
            except OSError:
                return  # not yet
            self._connected = True

    def _go_on(self) -> None:
        while (self._unsent or self._steps) and self.paused_until is None:
            if self._unsent:
                start = (self._place + self.sent) % ROUND
                try:
                    done = self.sock.send(memoryview(STREAM)[start : start + self._unsent])
                except BlockingIOError:
                    return
                self.sent += done
                self._unsent -= done
                continue
            verb, amount = self._steps.pop()
            if verb == "send":
                self._unsent = int(amount)
            elif verb == "await":
                if self.got < amount and self.saw is None:
                    self._steps.append((verb, amount))
                    return
            elif verb == "finish":
                self.sock.shutdown(socket.SHUT_WR)
                self.finished = True
            elif verb == "reset":
                self._reset()
                return
            else:
                self.paused_until = time.monotonic() + amount
                self.deaf = verb == "deaf" or self.saw is not None

    def _reset(self) -> None:
        self.reset = self.over = True
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _read(self) -> None:
        while self.saw is None:
            try:
                block = self.sock.recv(BLOCK)
            except BlockingIOError:
                return
            self._take(block)
            if not block:
                self.saw = "EOF"

    def _take(self, block: bytes) -> None:
        start = (self._peer_place + self.got) % ROUND
        if block != STREAM[start : start + len(block)]:
            self.faults.append(f"other bytes than were sent, from {self.got} on")
        self.got += len(block)

    def _broken(self, error: OSError) -> None:
        """The kernel tells of a reset once; what had come before it may still be read, but an EOF behind it is none."""
        self.over = True
        self.broke = errno.errorcode[error.errno or 0]
        if self.saw is None:
            self.saw = self.broke
            while True:
                try:
                    block = self.sock.recv(BLOCK)
                except OSError:
                    break
                if not block:
                    break
                self._take(block)
