"""One connection from accept to its record, with a real client, a real server and real threads.

Without interception a destination comes from `target`; where the original destination itself matters, the server
takes the listener's place on the very address that the client connected to.
"""

import logging
import os
import resource
import socket
import time

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from desks import DeskMaker, assert_refused, target_of
from lines import Lines
from loopback import FIN, RST
from rows import Seen

from tproxy_relay.net import endpoint, orig_dst, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.outcome import Outcome
from tproxy_relay.relay import connection as connection_module
from tproxy_relay.relay import pumps as relay_module
from tproxy_relay.relay import snapshot
from tproxy_relay.relay.connection import THREADS, Connection
from tproxy_relay.relay.loops import Flow
from tproxy_relay.relay.policy import RefusedError
from tproxy_relay.settings import Network

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

STUCK = sockets.SEND_TICK + 0.5


# --- completed, and the record


def test_a_completed_connection_and_every_field_of_its_line(
    desks: DeskMaker, server: socket.socket, lines: Lines
) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        desk.start()
        upstream, address = server.accept()
        with upstream:
            client.sendall(b"question")
            assert loopback.read_exactly(upstream, 8) == b"question"
            upstream.sendall(b"the answer")
            upstream.shutdown(socket.SHUT_WR)
            assert loopback.read_to_end(client) == (b"the answer", FIN)
            client.shutdown(socket.SHUT_WR)
            assert loopback.read_to_end(upstream) == (b"", FIN)
            desk.await_end()
        (line,) = lines.closed()
        times = {name: line.pop(name) for name in list(line) if name.endswith(("_ms", "seconds", "_retransmits"))}
        assert line == {
            "id": "c1",
            "listener": desk.listener.name,
            "client": str(endpoint.from_sockaddr(client.getsockname())),
            "orig_dst": desk.listener.name,
            "destination": str(target_of(server)),
            "upstream_local": str(endpoint.from_sockaddr(address)),
            "source": "relay",
            "outcome": "completed",
            "bytes_up": 8,
            "bytes_down": 10,
        }
        assert set(times) == {
            "seconds", "connect_seconds",
            "client_rtt_ms", "client_retransmits", "upstream_rtt_ms", "upstream_retransmits",
        }  # fmt: skip
        assert 0 < times["connect_seconds"] < times["seconds"] < PATIENCE  # type: ignore[operator]
        assert 0 < times["client_rtt_ms"] < 1000  # type: ignore[operator]
    (record,) = lines.of("connection closed")
    assert (record.levelno, record.name) == (logging.INFO, "tproxy_relay.access")
    (opened,) = lines.of("connection open")
    assert opened.levelno == logging.DEBUG
    assert desk.slot.numbers.closed == {"completed": 1}


def test_the_original_destination_is_where_it_goes(desks: DeskMaker, lines: Lines) -> None:
    """The listener makes room for a server on the address that the client had asked for."""
    desk = desks(own_ports=frozenset(), allow=(Network("127.0.0.0/8"),))
    with desk.dial() as client:
        accepted = desk.accept()
        wanted = desk.listener.endpoint
        desk.listener.close()
        desk.listener.endpoint = Endpoint("127.0.0.1", 1)
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.settimeout(PATIENCE)
            server.bind(wanted.sockaddr)
            server.listen(1)
            desk.threads.run(accepted.run)
            with server.accept()[0] as upstream:
                upstream.sendall(b"here")
                assert loopback.read_exactly(client, 4) == b"here"
                assert str(accepted.orig_dst) == str(accepted.destination) == str(wanted)
    (line,) = lines.closed()
    assert line["orig_dst"] == str(wanted)
    assert "destination" not in line, "said once only"


def test_a_destination_that_is_not_allowed(desks: DeskMaker, lines: Lines) -> None:
    desk = desks(own_ports=frozenset())
    with desk.dial() as client:
        accepted = desk.accept()
        wanted = desk.listener.endpoint
        desk.listener.endpoint = Endpoint("127.0.0.1", 1)
        desk.threads.run(accepted.run)
        line = assert_refused(desk, client, lines, "denied", logging.WARNING)
    assert line["error"] == f"{wanted} is in 127.0.0.0/8 (loopback)"
    assert (line["orig_dst"], "upstream_local" in line) == (str(wanted), False)


def test_redirect_mode_without_interception_goes_to_the_target(desks: DeskMaker, server: socket.socket) -> None:
    desk = desks(target_of(server), mode="redirect")
    with desk.dial() as client:
        desk.start()
        with server.accept()[0] as upstream:
            upstream.sendall(b"hello")
            assert loopback.read_exactly(client, 5) == b"hello"
    desk.await_end()


@pytest.mark.usefixtures("ipv6_loopback")
def test_an_ipv6_target(desks: DeskMaker, lines: Lines) -> None:
    with loopback.listen("::1") as server:
        desk = desks(target_of(server))
        with desk.dial():
            desk.start()
            server.accept()[0].close()
        assert str(lines.closed()[0]["upstream_local"]).startswith("[::1]:")
        desk.await_end()


def test_a_slow_client_gets_all_after_a_clean_close(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk, data = desks(target_of(server)), loopback.pattern(300_000)
    with desk.dial(receive_buffer=4096) as client:
        desk.start()
        client.shutdown(socket.SHUT_WR)
        with server.accept()[0] as upstream:
            upstream.sendall(data)
        assert lines.outcomes() == ["completed"]
        assert loopback.read_to_end(client) == (data, FIN)
    desk.await_end()


# --- broken by a peer


@pytest.mark.parametrize("who", ["client", "upstream"])
def test_a_reset_reaches_the_other_side(desks: DeskMaker, server: socket.socket, lines: Lines, who: str) -> None:
    desk, data = desks(target_of(server)), loopback.pattern(50_000)
    with desk.dial() as client:
        desk.start()
        with server.accept()[0] as upstream:
            here, there = (client, upstream) if who == "client" else (upstream, client)
            here.sendall(data)
            assert loopback.read_exactly(there, len(data)) == data
            loopback.reset(here)
            assert loopback.read_to_end(there) == (b"", RST)
    (line,) = lines.closed()
    assert line["outcome"] == f"{who}-reset"
    assert line["error"] == "Connection reset by peer"
    assert line["bytes_up" if who == "client" else "bytes_down"] == len(data)
    assert lines.of("connection closed")[0].levelno == logging.INFO
    desk.await_end()


def test_a_client_that_is_gone_before_anything_happened(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk = desks(target_of(server))
    client = desk.dial()
    accepted = desk.accept()
    loopback.reset(client)
    wait_until(lambda: sockets.is_dead(accepted.client_leg.sock), "the reset arrives")
    desk.threads.run(accepted.run)
    assert lines.outcomes() == ["client-reset"]
    desk.await_end()


# --- refused by the relay, or by the network


def test_connect_refused(desks: DeskMaker, lines: Lines) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets this port
        desk = desks(target_of(taken))
        with desk.dial() as client:
            desk.start()
            line = assert_refused(desk, client, lines, "connect-refused", logging.WARNING)
    assert line["error"] == "Connection refused"
    assert "upstream_local" not in line
    assert "connect_seconds" not in line


def test_connect_timeout(desks: DeskMaker, lines: Lines) -> None:
    with loopback.full_backlog() as address:
        desk = desks(Endpoint(*address), connect_timeout=0.3)
        with desk.dial() as client:
            began = time.monotonic()
            desk.start()
            assert_refused(desk, client, lines, "connect-timeout", logging.WARNING)
            assert 0.25 < time.monotonic() - began < 2


def test_connect_unreachable(desks: DeskMaker, lines: Lines) -> None:
    desk = desks(Endpoint("255.255.255.255", 9))
    with desk.dial() as client:
        desk.start()
        assert_refused(desk, client, lines, "connect-unreachable", logging.WARNING)


def test_self_call(desks: DeskMaker, lines: Lines) -> None:
    with loopback.listen() as other:  # another listener of this relay
        desk = desks(target_of(other), frozenset({other.getsockname()[1]}))
        with desk.dial() as client:
            desk.start()
            line = assert_refused(desk, client, lines, "self-call", logging.WARNING)
            assert str(target_of(other)) in str(line["error"])
        other.settimeout(0)
        with pytest.raises(BlockingIOError):
            other.accept()


def test_not_intercepted(desks: DeskMaker, lines: Lines) -> None:
    desk = desks()
    with desk.dial() as client:
        desk.start()
        assert_refused(desk, client, lines, "not-intercepted", logging.WARNING)


def test_loop(desks: DeskMaker, lines: Lines) -> None:
    """The ruleset intercepts the relay's own connection: it comes back to a listener, from our own address and to
    where we connected. Here, the target is the listener and own_ports does not know it."""
    desk = desks(Endpoint("127.0.0.1", 1), own_ports=frozenset())
    desk.context.policy.__dict__["target"] = desk.listener.endpoint
    with desk.dial() as client:
        desk.start()
        desk.start()  # what the first one opened
        assert loopback.read_to_end(client)[1] == RST
        assert "loop" in lines.outcomes(2)
    assert "ruleset lacks the rule" in str([line.get("error") for line in lines.closed(2)])
    assert desk.slot.numbers.accepted == 2, "it went round once"
    desk.await_end()
    desk.await_end()
    assert desk.registry.loops.debug_state() == {"flows": 0}


def test_out_of_descriptors(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        accepted = desk.accept()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        taken = [os.dup(0)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
            with pytest.raises(OSError):
                for _ in range(1000):
                    taken.append(os.dup(0))
            desk.threads.run(accepted.run)
            assert loopback.read_to_end(client) == (b"", RST)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in taken:
                os.close(fd)
    assert lines.outcomes() == ["over-limit"]
    desk.await_end()


def test_refuse_resets_without_a_thread(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        desk.accept().refuse("too many")
        desk.threads.release(THREADS)
        line = assert_refused(desk, client, lines, "over-limit", logging.WARNING)
    assert line["error"] == "too many"


# --- bugs


@pytest.mark.parametrize(
    ("module", "leaf"), [(orig_dst, "original_destination"), (sockets, "upstream_socket"), (endpoint, "from_sockaddr")]
)
@pytest.mark.row("H29", "an exception at each step before the relay", "reset, recorded, nothing left")
def test_a_bug_before_the_relay_is_recorded_and_resets(
    desks: DeskMaker,
    server: socket.socket,
    lines: Lines,
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    leaf: str,
    seen: Seen,
) -> None:
    def bug(*_args: object) -> None:
        raise ValueError("the kernel said nonsense")

    desk = desks(target_of(server))
    with desk.dial() as client:
        accepted = desk.accept()
        monkeypatch.setattr(module, leaf, bug)
        desk.threads.run(accepted.run)
        assert loopback.read_to_end(client) == (b"", RST)
        desk.await_end()
        monkeypatch.undo()
    assert lines.outcomes() == ["internal-error"]
    assert lines.closed()[0]["error"] == "ValueError('the kernel said nonsense')"
    (line,) = lines.of("a connection met a bug")
    assert line.exc_info and line.exc_info[1] is not None
    seen("reset, internal-error")


@pytest.mark.row("H29", "an exception in a pump", "both ends reset, recorded, nothing left")
def test_a_bug_in_the_relay_is_recorded_and_resets(
    desks: DeskMaker, server: socket.socket, lines: Lines, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    def bug(*_args: object) -> None:
        raise ValueError("no")

    desk = desks(target_of(server))
    with desk.dial() as client:
        desk.start()
        with server.accept()[0] as upstream:
            upstream.send(b"x")
            client.recv(1)
            monkeypatch.setattr(sockets, "half_close", bug)
            client.shutdown(socket.SHUT_WR)
            assert loopback.read_to_end(upstream) == (b"", RST)
            assert loopback.read_to_end(client)[1] == RST
    assert lines.outcomes() == ["internal-error"]
    assert len(lines.of("a relay met a bug")) == 1
    desk.await_end()
    seen("reset, internal-error")


def test_what_fails_at_the_very_end_gives_everything_back_all_the_same(
    desks: DeskMaker, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_args: object) -> None:
        raise MemoryError

    desk = desks(target_of(server))
    monkeypatch.setattr(Connection, "_record", no_memory)
    with desk.dial() as client:
        desk.start()
        with server.accept()[0] as upstream:
            client.shutdown(socket.SHUT_WR)
            upstream.shutdown(socket.SHUT_WR)
            desk.await_end()
            assert loopback.read_to_end(client)[1] in (FIN, RST)
    assert not len(desk.registry)
    assert desk.threads.reserve(THREADS)
    desk.threads.release(THREADS)


def test_a_client_that_nothing_intercepted_is_no_evidence_of_a_loop(desks: DeskMaker, server: socket.socket) -> None:
    """Its flow ends at the listener. One from it to the target never existed, but may be one of ours tomorrow."""
    desk = desks(target_of(server), mode="redirect")
    with desk.dial() as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            upstream.send(b"x")
            client.recv(1)
            opened = Flow(endpoint.from_sockaddr(upstream.getpeername()), target_of(server))
            assert opened in started.flows
            assert Flow(started.client, target_of(server)) not in started.flows
    desk.await_end()


# --- told to end, in every phase


@pytest.mark.parametrize("outcome", [Outcome.DRAINED, Outcome.ABORTED, Outcome.IDLE])
def test_abort_while_connecting(desks: DeskMaker, lines: Lines, outcome: Outcome) -> None:
    with loopback.full_backlog() as address:
        desk = desks(Endpoint(*address), connect_timeout=20.0)
        with desk.dial() as client:
            started = desk.start()
            wait_until(lambda: started.upstream_leg is not None and in_connect(started), "it connects")
            assert snapshot.state(started) == "connecting"
            began = time.monotonic()
            started.abort(outcome)
            assert_refused(desk, client, lines, outcome.value, logging.INFO)
            assert time.monotonic() - began < 1


def in_connect(connection: Connection) -> bool:
    """True once the SYN is out."""
    leg = connection.upstream_leg
    return leg is not None and sockets.tcp_info(leg.sock).state == 2  # TCP_SYN_SENT


def test_abort_before_it_runs(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        accepted = desk.accept()
        accepted.abort(Outcome.ABORTED)
        desk.threads.run(accepted.run)
        assert_refused(desk, client, lines, "aborted", logging.INFO)


def test_abort_between_connecting_and_relaying(
    desks: DeskMaker, server: socket.socket, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = desks(target_of(server))
    real = connection_module.Relay

    def aborted_just_now(*args: object) -> object:
        started.abort(Outcome.DRAINED)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(connection_module, "Relay", aborted_just_now)
    with desk.dial() as client:
        started = desk.accept()
        desk.threads.run(started.run)
        with server.accept()[0] as upstream:
            assert loopback.read_to_end(client)[1] == RST
            assert loopback.read_to_end(upstream)[1] == RST
    assert lines.outcomes() == ["drained"]
    desk.await_end()


@pytest.mark.parametrize("outcome", [Outcome.DRAINED, Outcome.ABORTED, Outcome.IDLE, Outcome.HALF_CLOSE_TIMEOUT])
@pytest.mark.parametrize("half_closed", [False, True])
def test_abort_while_relaying(
    desks: DeskMaker, server: socket.socket, lines: Lines, outcome: Outcome, half_closed: bool
) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            upstream.send(b"x")
            client.recv(1)
            if half_closed:
                client.shutdown(socket.SHUT_WR)
                assert loopback.read_to_end(upstream) == (b"", FIN)
            started.abort(outcome)
            started.abort(Outcome.OVER_LIMIT)  # the first reason counts
            assert loopback.read_to_end(client)[1] == RST
            wait_until(lambda: loopback.is_reset(upstream), "the server is reset")
    assert lines.outcomes() == [outcome.value]
    assert lines.of("connection closed")[0].levelno == logging.INFO
    desk.await_end()


def test_abort_while_a_send_is_stuck(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            loopback.fill(client)
            began = time.monotonic()
            started.abort(Outcome.ABORTED)
            desk.await_end()
            assert time.monotonic() - began < STUCK
            wait_until(lambda: loopback.is_reset(upstream), "the server is reset")
    assert lines.outcomes() == ["aborted"]


def test_abort_while_flushing(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    """The server has reset; the client does not read; the relay waits for it until it is told to end."""
    desk = desks(target_of(server))
    with desk.dial(receive_buffer=4096) as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            upstream.sendall(bytes(100_000))
            wait_until(lambda: started.moved[1] == 100_000, "the relay has it")
            loopback.reset(upstream)
        wait_until(lambda: started.relay is not None and started.relay._pumps == 0, "both pumps are done")
        assert not lines.of("connection closed")
        began = time.monotonic()
        started.abort(Outcome.ABORTED)
        desk.await_end()
        assert time.monotonic() - began < 1
        wait_until(lambda: loopback.is_reset(client), "the client is reset")
    assert lines.outcomes() == ["upstream-reset"], "that came first"


def test_abort_after_the_end(desks: DeskMaker, server: socket.socket, lines: Lines) -> None:
    desk = desks(target_of(server))
    with desk.dial():
        started = desk.start()
        server.accept()[0].close()
    desk.await_end()
    started.abort(Outcome.ABORTED)
    started.abandon()
    started.refuse(RefusedError(Outcome.OVER_LIMIT, "late"))
    assert lines.outcomes() == ["completed"]
    assert desk.slot.numbers.closed == {"completed": 1}


def test_abandon_records_what_is_stuck_and_its_thread_does_not_record_again(
    desks: DeskMaker, server: socket.socket, lines: Lines
) -> None:
    desk = desks(target_of(server))
    with desk.dial() as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            upstream.send(b"x")
            client.recv(1)
            started.abandon()
            assert lines.outcomes() == ["aborted"]
            assert len(desk.registry) == 0
    wait_until(lambda: started.relay is not None and started.relay._pumps == 0, "it ends after all")
    assert lines.outcomes() == ["aborted"]
    for leg in (started.client_leg, started.upstream_leg):
        if leg is not None:
            leg.sock.close()
    desk.threads.release(THREADS)


# --- the end of a broken one


def test_an_undelivered_flush_is_bounded(
    desks: DeskMaker, server: socket.socket, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay_module, "FLUSH_TIMEOUT", 0.2)
    desk = desks(target_of(server))
    with desk.dial(receive_buffer=4096) as client:
        started = desk.start()
        with server.accept()[0] as upstream:
            upstream.sendall(bytes(100_000))
            wait_until(lambda: started.moved[1] == 100_000, "the relay has it")
            loopback.reset(upstream)
        desk.await_end()
        wait_until(lambda: loopback.is_reset(client), "the client is reset")
    assert lines.outcomes() == ["upstream-reset"]
