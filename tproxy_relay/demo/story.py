"""What the demo tells, in order. Nothing is said that was not measured just before.

Each step through the relay is proven by the relay's own record of it: the same client, the same destination.
A step that is not as promised ends the demo.
"""

import contextlib
import http.client
import socket
import time

from tproxy_relay.demo import exchanges, screen, throughput
from tproxy_relay.demo.exchanges import Answer, Conversation
from tproxy_relay.errors import RelayError
from tproxy_relay.lab import Lab, LabError, Line, RelayProcess
from tproxy_relay.net.endpoint import Endpoint

INTERCEPTED = "8000-8999"
WEB, WEB_DIRECT = 8080, 9080
TALK, TALK_DIRECT = 8081, 9081
STREAM, STREAM_DIRECT = 8082, 9082
"""Each server twice: on a port that goes through the relay, and on one that does not."""

PROOF_TIMEOUT = 5.0
"""Seconds for the relay to write of a connection that is over; it takes a few milliseconds."""

FAMILIES = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}

PICTURE = """
     client                       relay                       server
   10.81.1.2 ----------- 10.81.1.1     10.81.2.1 ----------- 10.81.2.2
   fd81:1::2             fd81:1::1     fd81:2::1             fd81:2::2
"""


class BrokenPromise(RelayError):
    """A step of the demo did not come out as it should."""


def promise(what: str, got: object, wanted: object) -> None:
    """Raise BrokenPromise unless what was got is what was wanted; `what` names it."""
    if got != wanted:
        raise BrokenPromise(f"the demo is not as promised: {what}: {got}, expected {wanted}")


class Story:
    """The show, told once on a fresh lab. What it starts ends with `opened`."""

    def __init__(self, lab: Lab, opened: contextlib.ExitStack) -> None:
        self._lab = lab
        self._opened = opened
        self._records: list[Line] = []
        self._carried = 0

    def show(self) -> RelayProcess:
        """All of it; returns the relay, which still runs, as the web servers do."""
        try:
            return self._show()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BrokenPromise(f"the demo is not as promised: {type(error).__name__}: {error}") from error

    def _show(self) -> RelayProcess:
        self._introduce()
        direct, relayed = self._web_pages()
        self._who_is_seen(direct, relayed)
        self._endings()
        self._speed()
        self._killed()
        self._access_lines()
        return self._relay

    def _introduce(self) -> None:
        self._rules_before = self._rules()
        began = time.monotonic()
        self._relay = self._start_relay()
        for port in (WEB, WEB_DIRECT):
            self._opened.callback(exchanges.WebServer(self._lab.server, port).close)
        screen.say(PICTURE)
        screen.remark(f"New connections to ports {INTERCEPTED} are steered to the relay program (process")
        ready = time.monotonic() - began
        screen.remark(f"{self._relay.pid}, ready after {ready:.2f} s). All others are forwarded as ever.")

    def _start_relay(self, *options: str) -> RelayProcess:
        """The relay installs its ruleset before it says that it is ready."""
        return self._opened.enter_context(self._lab.relay_process("--intercept-inbound", INTERCEPTED, *options))

    def _web_pages(self) -> tuple[list[Answer], list[Answer]]:
        screen.title("1. The client asks for a web page, at the server's own address")
        direct = [exchanges.get(self._lab, WEB_DIRECT, family) for family in FAMILIES.values()]
        relayed = []
        for label, family in FAMILIES.items():
            answer, record = self._get(family)
            relayed.append(answer)
            screen.fact(label, f"status {answer.status} from {answer.asked_for}")
            screen.fact("", f"carried by the relay: its record has {record['client']}")
        return direct, relayed

    def _get(self, family: int) -> tuple[Answer, Line]:
        answer = exchanges.get(self._lab, WEB, family)
        promise("status of the web page", answer.status, 200)
        return answer, self._proof(answer.name, answer.asked_for, "completed")

    def _proof(self, name: Endpoint, asked_for: Endpoint, outcome: str) -> Line:
        """The relay's own record of this very connection."""
        both = {"client": str(name), "orig_dst": str(asked_for)}
        try:
            record = self._relay.wait_for_record(lambda record: both.items() <= record.items(), PROOF_TIMEOUT)
        except LabError as error:
            raise BrokenPromise(f"the demo is not as promised: {name} to {asked_for}: {error}") from error
        promise(f"outcome of {name} to {asked_for}", record["outcome"], outcome)
        self._carried += 1
        return record

    def _who_is_seen(self, direct: list[Answer], relayed: list[Answer]) -> None:
        screen.title("2. Whom each side saw")
        screen.seen_head()
        for answer in direct:
            promise("whom the server saw, directly", answer.seen, answer.name)
            self._seen("not relayed", answer)
        for answer, family in zip(relayed, FAMILIES.values()):
            promise("whom the server saw, relayed", answer.seen.host, self._lab.relay_address(family))
            self._seen("relayed", answer)
        self._change_relay("--preserve-source", "address")
        for family in FAMILIES.values():
            answer, record = self._get(family)
            promise("the source, in the relay's record", record["source"], "address")
            promise("whom the server saw, source preserved", answer.seen.host, answer.name.host)
            self._seen("relayed, --preserve-source address", answer)

    def _seen(self, how: str, answer: Answer) -> None:
        server = self._lab.server
        promise("whom the client saw", answer.asked_for.host in (server.ipv4, server.ipv6), True)
        meaning = "the client" if answer.seen.host == answer.name.host else "the relay"
        screen.seen_line(how, answer.asked_for.host, answer.seen.host, meaning)

    def _change_relay(self, *options: str) -> None:
        self._records += self._relay.records()
        self._relay.stop()
        self._relay = self._start_relay(*options)

    def _endings(self) -> None:
        screen.title("3. What one side does, the other side sees")
        upload = exchanges.UPLOAD
        screen.remark(f"The client sends {len(upload):,} bytes and shuts its side; the server then answers:")
        for how, port in (("directly", TALK_DIRECT), ("relayed", TALK)):
            with exchanges.conversation(self._lab, port) as talk:
                answer, ending = exchanges.half_close(talk)
            promise(f"a half-close, {how}", (answer, ending), (exchanges.digest(upload), "EOF"))
            self._check_path(talk, port, "completed")
            screen.fact(how, f"server got {answer[:32]}..., client got {ending}")
        screen.remark(f"The server sends {exchanges.BEFORE_RESET:,} bytes and resets the connection:")
        for how, port in (("directly", TALK_DIRECT), ("relayed", TALK)):
            with exchanges.conversation(self._lab, port) as talk:
                got, ending = exchanges.break_off(talk)
            promise(f"a reset, {how}", (got, ending), (exchanges.BEFORE_RESET, "ECONNRESET"))
            self._check_path(talk, port, "upstream-reset")
            screen.fact(how, f"client got {got:,} bytes, then {ending}")

    def _check_path(self, talk: Conversation, port: int, outcome: str) -> None:
        """Relayed with proof, or direct: then even the client's port number was still on it at the server."""
        if port == TALK:
            self._proof(talk.name, talk.asked_for, outcome)
        else:
            promise("whom the server saw, directly", talk.seen, talk.name)

    def _speed(self) -> None:
        screen.title("4. How fast one connection is")
        direct = throughput.measure(self._lab, STREAM_DIRECT)
        promise("whom the server saw, directly", direct.seen, direct.name)
        screen.fact("directly", f"{direct.gbit_per_second:6.2f} Gbit/s")
        relayed = throughput.measure(self._lab, STREAM)
        record = self._proof(relayed.name, relayed.asked_for, "completed")
        promise("bytes in the relay's record", record["bytes_up"], relayed.bytes)
        share = relayed.gbit_per_second / direct.gbit_per_second
        screen.fact("relayed", f"{relayed.gbit_per_second:6.2f} Gbit/s, {share:.0%} of that")

    def _killed(self) -> None:
        screen.title("5. The relay is killed (kill -9), and started again")
        self._records += self._relay.records()
        self._relay.kill()
        began = time.monotonic()
        for label, family in FAMILIES.items():
            answer = exchanges.get(self._lab, WEB, family)
            promise("whom the server saw after the relay's death", answer.seen, answer.name)
            screen.fact(label, f"the next connection went direct: the server saw {answer.seen}")
        while self._rules() != self._rules_before:
            promise("rules left after the relay's death", time.monotonic() - began < PROOF_TIMEOUT, True)
        screen.fact("rules", f"all gone {time.monotonic() - began:.2f} s after the kill, and routing as before")
        self._relay = self._start_relay("--preserve-source", "address")
        answer, _ = self._get(socket.AF_INET)
        screen.fact("again", f"status {answer.status} from {answer.asked_for}, carried by the new relay")

    def _rules(self) -> list[str]:
        """What the relay's host steers packets by."""
        commands = (["nft", "list", "ruleset"], ["ip", "-4", "rule"], ["ip", "-6", "rule"])
        routes = (["ip", family, "route", "show", "table", "all"] for family in ("-4", "-6"))
        return [self._lab.relay.run(command).stdout for command in (*commands, *routes)]

    def _access_lines(self) -> None:
        screen.title("6. What the relay wrote about all this")
        screen.access_head()
        self._records += self._relay.records()
        for record in self._records:
            screen.access_line(record)
        promise("connections that went through the relay", len(self._records), self._carried)
