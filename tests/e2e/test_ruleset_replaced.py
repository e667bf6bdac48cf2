"""The ruleset is replaced by another one, and its guard handed over to another relay, under live intercepted
transfers: every byte arrives, and new connections go where the plan in force says.

A program beside the relay has the ruleset here, as its supervisor would, so that each can be killed alone.
"""

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
from deadlines import PATIENCE, wait_until
from interception import (
    BACKENDS,
    FAMILIES,
    OWN_SERVERS,
    PORT,
    EchoServer,
    attempt,
    furnish,
    look,
    opened,
    ping,
    processes,
    ways,
)

from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.lab import Host, Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr
from tproxy_relay.settings import PortRange

pytestmark = pytest.mark.slow

OTHER = 8001
"""A port that is intercepted at some times and not at others."""
FIRST, SECOND = (PortRange(PORT, PORT),), (PortRange(OTHER, OTHER),)

PLAN = Plan(
    mode="tproxy",
    inbound=FIRST,
    outbound=FIRST,
    inbound_port=15006,
    outbound_port=15002,
    listen={4: "0.0.0.0", 6: "::"},
    interface=None,
    preserve_source="no",
    on_failure="open",
    mark_mask=0x07000000,
    route_table=7006,
    route_priority=7006,
    exempt_uid=None,
)
MORE = replace(PLAN, inbound=FIRST + SECOND, outbound=FIRST + SECOND)
MOVED = replace(PLAN, inbound=SECOND, outbound=SECOND)
MODES = [(backend, mode) for backend in BACKENDS for mode in ("tproxy", "redirect")]

SUPERVISOR = """
import logging, os, sys
from tproxy_relay.ipc import channel
from tproxy_relay.errors import RelayError
from tproxy_relay.net.endpoint import from_sockaddr
from tproxy_relay.intercept import plan as plans
from tproxy_relay.guard.guard_client import Interception

plan, backend, taken, given = sys.argv[1:]
plan = plans.from_json(plan)
logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
if taken != "-1":
    interception = Interception.take_over(channel.adopt(int(taken)), plan, backend)
else:
    interception = Interception(plan, backend)
    interception.install()
print("ready", flush=True)
for order in sys.stdin:
    verb, _, rest = order.strip().partition(" ")
    try:
        if verb == "replace":
            interception.replace(plans.from_json(rest))
        elif verb == "hand-over":
            interception.hand_over(int(given), int(rest))
            os.close(int(given))
        else:
            getattr(interception, verb)()
        print("done", flush=True)
    except RelayError as error:
        print(f"refused: {error}", flush=True)
"""


class Supervisor:
    """The program: its orders, and what it says."""

    def __init__(self, child: "subprocess.Popen[bytes]") -> None:
        self._child = child
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        wait_until(lambda: "ready" in self.said or child.poll() is not None, "it has the ruleset", 20)
        assert "ready" in self.said, self.said

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self.said.append(line.decode().strip())

    @property
    def pid(self) -> int:
        return self._child.pid

    def order(self, order: str) -> str:
        """'' if it was done."""
        assert self._child.stdin is not None
        before = len(self._answers())
        self._child.stdin.write(f"{order}\n".encode())
        self._child.stdin.flush()
        wait_until(lambda: len(self._answers()) > before, f"an answer to {order[:20]}", 20)
        return self._answers()[-1].removeprefix("done")

    def _answers(self) -> list[str]:
        return [line for line in self.said if line == "done" or line.startswith("refused: ")]

    def replace(self, plan: Plan) -> None:
        assert self.order(f"replace {plans.to_json(plan)}") == ""

    def kill(self) -> None:
        """With SIGKILL; it is reaped."""
        self._child.kill()
        self._child.wait()


@contextlib.contextmanager
def supervising(lab: Lab, plan: Plan, backend: str, taken: int = -1, given: int = -1) -> Iterator[Supervisor]:
    command = [sys.executable, "-c", SUPERVISOR, plans.to_json(plan), backend, str(taken), str(given)]
    child = lab.relay.start(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd for fd in (taken, given) if fd >= 0]
    )
    try:
        yield Supervisor(child)
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


class Transfer:
    """Bytes to an echo server and back, until `finish`."""

    def __init__(self, source: Host, destination: Host, family: int) -> None:
        self._sock = source.connect(destination.address(family), PORT)
        self._sock.settimeout(20)
        self._stop = threading.Event()
        self.back = 0
        self.fault = ""
        self._digests = {"sent": "", "back": ""}
        self._threads = [threading.Thread(target=self._attempt, args=(one,)) for one in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _attempt(self, job: object) -> None:
        try:
            job()  # type: ignore[operator]
        except OSError as error:
            self.fault = repr(error)

    def _send(self) -> None:
        pool, digest, number = os.urandom(300_000), hashlib.sha256(), 0
        while not self._stop.is_set():
            piece = pool[number % 1000 : number % 1000 + (number * 7919) % 65536 + 1]
            self._sock.sendall(piece)
            digest.update(piece)
            number += 1
        self._sock.shutdown(socket.SHUT_WR)
        self._digests["sent"] = digest.hexdigest()

    def _receive(self) -> None:
        digest = hashlib.sha256()
        while data := self._sock.recv(65536):
            digest.update(data)
            self.back += len(data)
        self._digests["back"] = digest.hexdigest()

    def finish(self) -> str:
        """'' if all has come back, else what went wrong."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        self._sock.close()
        whole = self._digests["sent"] and self._digests["sent"] == self._digests["back"]
        return self.fault or ("" if whole else f"other bytes came back: {self._digests}")


class Transfers:
    """One for each way; the families take turns."""

    def __init__(self, lab: Lab) -> None:
        families = {"gateway": socket.AF_INET, "host": socket.AF_INET6, "local": socket.AF_INET}
        self.all = {way: Transfer(*ends, families[way]) for way, ends in ways(lab).items()}

    def go_on(self, when: str) -> None:
        """More bytes come back on each."""
        seen = {way: one.back for way, one in self.all.items()}
        for way, one in self.all.items():
            wait_until(lambda: one.fault or one.back > seen[way] + 300_000, f"{way} goes on, {when}", 20)
            assert not one.fault, f"{way}, {when}: {one.fault}"

    def finish(self) -> None:
        assert {way: one.finish() for way, one in self.all.items()} == dict.fromkeys(self.all, "")


@pytest.fixture
def furnished(fresh_lab: Lab) -> Iterator[Lab]:
    """A lab whose relay host has rules of others, with echo servers on both ports; afterwards no rule is left."""
    furnish(fresh_lab)
    before = look(fresh_lab)
    with contextlib.ExitStack() as stack:
        for host in (fresh_lab.server, fresh_lab.relay):
            for port in (PORT, OTHER):
                stack.callback(EchoServer(host, port).close)
        yield fresh_lab
    assert look(fresh_lab) == before


def check_new_ones(lab: Lab, relay: RelayProcess, *intercepted: int) -> None:
    """New connections work, and those to these ports lead through the relay, the others do not."""
    direct = [name for port in (PORT, OTHER) if port not in intercepted for name in new_ones(lab, port)]
    relayed = [name for port in intercepted for name in new_ones(lab, port)]

    def seen() -> set[str]:
        opened = (line for line in relay.lines() if line["message"] == "connection open")
        return {f"{line['client']} {line['orig_dst']}" for line in opened}

    # The log is in the order of events: by then it would show a direct one, too.
    wait_until(lambda: seen().issuperset(relayed), f"connections to {intercepted} are relayed")
    assert not seen().intersection(direct), f"intercepted, with {intercepted}"


def new_ones(lab: Lab, port: int) -> Iterator[str]:
    """Connect each way, with each family; how the relay would call client and orig_dst.

    Each from a port that nothing else has: where destinations are rewritten, the kernel gives another one to a client's
    second connection from the same port, because it leads to the same listener.
    """
    for way, (source, destination) in ways(lab).items():
        for name, family in FAMILIES.items():
            with source.socket(family) as sock:
                sock.settimeout(PATIENCE)
                sock.bind(("", 0))
                sock.connect((destination.address(family), port))
                assert ping(sock) == "", f"{way}/{name} to port {port}"
                yield f"{from_sockaddr(sock.getsockname())} {from_sockaddr(sock.getpeername())}"


@pytest.mark.parametrize(("backend", "mode"), MODES)
def test_ports_come_and_go_under_live_transfers(furnished: Lab, backend: str, mode: str) -> None:
    lab = furnished
    plan, more, moved = (replace(one, mode=mode) for one in (PLAN, MORE, MOVED))
    with lab.relay_process("--mode", mode, *OWN_SERVERS) as relay, supervising(lab, plan, backend) as supervisor:
        transfers = Transfers(lab)
        wait_until(lambda: opened(relay) == 3, "they are intercepted")
        for now, intercepted in ((more, (PORT, OTHER)), (moved, (OTHER,)), (more, (PORT, OTHER)), (plan, (PORT,))):
            supervisor.replace(now)
            transfers.go_on(f"with {intercepted}")
            check_new_ones(lab, relay, *intercepted)
        for _ in range(20):
            supervisor.replace(moved)
            supervisor.replace(more)
        transfers.go_on("after forty more")
        transfers.finish()
        assert supervisor.order("remove") == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_would_end_connections_is_refused_and_they_go_on(furnished: Lab, backend: str) -> None:
    lab = furnished
    with lab.relay_process(*OWN_SERVERS), supervising(lab, MORE, backend) as supervisor:
        transfers, rules = Transfers(lab), look(lab)
        for plan in (
            replace(MORE, outbound=()),
            replace(MORE, listen={4: "0.0.0.0"}),
            replace(MORE, preserve_source="full"),
        ):
            refusal = supervisor.order(f"replace {plans.to_json(plan)}")
            assert refusal.startswith("refused: ") and "would end connections that the relay has" in refusal
            assert look(lab) == rules
        supervisor.replace(replace(MORE, inbound=()))
        transfers.go_on("though nothing inbound is taken any more")
        transfers.finish()
        assert supervisor.order("remove") == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_failure_can_change_under_live_transfers(furnished: Lab, backend: str) -> None:
    lab, before = furnished, look(furnished)
    closed = replace(MORE, on_failure="closed")
    with lab.relay_process(*OWN_SERVERS) as relay:
        with supervising(lab, PLAN, backend) as supervisor:
            transfers = Transfers(lab)
            for plan in (closed, PLAN) * 10:
                supervisor.replace(plan)
            transfers.go_on("open again")
            supervisor.replace(closed)
            transfers.finish()
            supervisor.kill()
            wait_until(lambda: not processes(lab, "-m tproxy_relay.guard"), "the guard has done its work")
        assert look(lab) != before
        relay.kill()
        for source, destination in ways(lab).values():
            for family in FAMILIES.values():
                assert attempt(source, destination, family) == "ConnectionRefusedError"
    with lab.relay_process(*OWN_SERVERS) as relay, supervising(lab, closed, backend) as supervisor:
        transfers = Transfers(lab)
        supervisor.replace(PLAN)
        transfers.finish()
        assert opened(relay) == 3
        supervisor.kill()
        wait_until(lambda: look(lab) == before, "everything is as before")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guard_that_is_handed_over_belongs_to_the_second(furnished: Lab, backend: str) -> None:
    lab, before = furnished, look(furnished)
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        lab.relay_process(*OWN_SERVERS) as relay,
        supervising(lab, PLAN, backend, given=ends[0].fileno()) as first,
    ):
        transfers = Transfers(lab)
        rules, guards = look(lab), processes(lab, "-m tproxy_relay.guard")
        ends[0].close()
        # It waits for the guard, so the first must hear of it before it is ready.
        handing = threading.Thread(target=first.order, args=("hand-over 4711",))
        handing.start()
        with supervising(lab, MORE, backend, taken=ends[1].fileno()) as second:
            handing.join()
            ends[1].close()
            for order in ("drain", "remove"):
                assert first.order(order) == ""
            first.kill()
            assert look(lab) == rules and processes(lab, "-m tproxy_relay.guard") == guards
            transfers.go_on("when the first is dead")
            second.replace(MORE)
            transfers.go_on("with the plan of the second")
            check_new_ones(lab, relay, PORT, OTHER)
            assert processes(lab, "-m tproxy_relay.guard") == guards
            transfers.finish()
            rules = look(lab)
            os.kill(guards[0], signal.SIGKILL)
            wait_until(lambda: "ruleset restored" in second.said, "the second has started another guard")
            assert look(lab) == rules
            check_new_ones(lab, relay, PORT, OTHER)
            second.kill()
            wait_until(lambda: look(lab) == before, "on-failure is open")
    wait_until(lambda: not processes(lab, "-m tproxy_relay.guard"), "the guard has ended")
