"""Both pumps over real connections: whatever one end does, the other end must see it."""

import select
import socket
import threading
import time
from collections.abc import Iterator

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from loopback import FIN, RST
from rigs import ANYWHERE, Rig

from tproxy_relay.net import sockets
from tproxy_relay.relay import pumps as relay_module
from tproxy_relay.relay.pumps import Leg, Patience, Relay
from tproxy_relay.worker.hangups import Hangups

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

STUCK = sockets.SEND_TICK + 0.5
"""Seconds within which a pump that is stuck in send() must notice an abort."""


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig() as running:
        yield running


# --- FIN


def test_bytes_go_both_ways_and_are_counted(rig: Rig) -> None:
    up, down = loopback.pattern(100_003), loopback.pattern(77_777)
    rig.client.sendall(up)
    rig.server.sendall(down)
    assert loopback.read_exactly(rig.server, len(up)) == up
    assert loopback.read_exactly(rig.client, len(down)) == down
    rig.client.shutdown(socket.SHUT_WR)
    rig.server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.client) == (b"", FIN)
    assert loopback.read_to_end(rig.server) == (b"", FIN)
    relay = rig.ended()
    assert relay.clean and relay.failed is None
    assert (relay.upstream.sent, relay.client.sent) == (len(up), len(down))


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_close_is_passed_on_and_the_other_direction_goes_on(rig: Rig, first: str) -> None:
    here, there = (rig.client, rig.server) if first == "client" else (rig.server, rig.client)
    assert not rig.relay.half_closed
    here.sendall(b"question")
    here.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(there) == (b"question", FIN)
    assert rig.relay.half_closed
    assert not rig.relay.clean
    for _ in range(3):
        there.sendall(b"answer")
        assert loopback.read_exactly(here, 6) == b"answer"
    assert not rig.over.is_set()
    there.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(here) == (b"", FIN)
    assert rig.ended().clean


def test_a_connection_without_a_byte_ends_cleanly(rig: Rig) -> None:
    rig.client.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.server) == (b"", FIN)
    rig.server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.client) == (b"", FIN)
    relay = rig.ended()
    assert relay.clean
    assert (relay.upstream.sent, relay.client.sent) == (0, 0)


def test_both_sides_close_at_once(rig: Rig) -> None:
    rig.client.shutdown(socket.SHUT_WR)
    rig.server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.client) == loopback.read_to_end(rig.server) == (b"", FIN)
    assert rig.ended().clean


def test_exactly_one_of_the_two_is_the_last_to_leave() -> None:
    for _ in range(20):
        with Rig() as rig:
            rig.client.close()
            rig.server.close()
            rig.ended()
            assert sorted(rig.lasts) == [False, True]


def test_a_slow_reader_gets_everything_that_was_queued_when_the_relay_closed() -> None:
    data = loopback.pattern(300_000)
    with Rig(client_buffer=4096) as rig:
        rig.client.shutdown(socket.SHUT_WR)
        rig.server.sendall(data)
        rig.server.close()
        rig.ended()  # closed by the relay, and the client has read nothing yet
        assert loopback.read_to_end(rig.client) == (data, FIN)
        assert rig.relay.clean


# --- RST


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.parametrize("count", [0, 100_000])
def test_a_reset_comes_after_all_the_data_before_it(rig: Rig, who: str, count: int) -> None:
    here, there = (rig.client, rig.server) if who == "client" else (rig.server, rig.client)
    data = loopback.pattern(count)
    here.sendall(data)
    wait_until(lambda: rig.relay.upstream.sent + rig.relay.client.sent == count, "the relay has the data")
    loopback.reset(here)
    assert loopback.read_to_end(there) == (data, RST)
    relay = rig.ended()
    assert relay.failed is (relay.client if who == "client" else relay.upstream)
    assert isinstance(relay.failed.error, ConnectionResetError)
    assert not relay.clean
    assert sorted(rig.lasts) == [False, True]


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_slow_reader_gets_all_the_data_before_the_reset(who: str) -> None:
    data = loopback.pattern(150_000)
    with Rig(client_buffer=4096, server_buffer=4096) as rig:
        here, there = (rig.client, rig.server) if who == "client" else (rig.server, rig.client)
        here.sendall(data)
        wait_until(lambda: rig.relay.upstream.sent + rig.relay.client.sent == len(data), "the relay has the data")
        loopback.reset(here)
        parts = bytearray()
        there.settimeout(PATIENCE)
        with pytest.raises(ConnectionResetError):
            while data_now := there.recv(2048):
                parts += data_now
                time.sleep(0.0005)  # that is what makes it slow
        assert parts == data
        rig.ended()


def test_a_reader_that_never_reads_is_reset_when_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "FLUSH_TIMEOUT", 0.3)
    with Rig(client_buffer=4096) as rig:
        rig.server.sendall(bytes(150_000))
        wait_until(lambda: rig.relay.client.sent == 150_000, "the relay has the data")
        loopback.reset(rig.server)
        rig.ended(3)
        assert 0.25 < rig.flush_seconds < 2
        wait_until(lambda: loopback.is_reset(rig.client), "the client is reset")


def test_abort_ends_the_wait_for_a_reader_that_does_not_read() -> None:
    with Rig(client_buffer=4096) as rig:
        rig.server.sendall(bytes(150_000))
        wait_until(lambda: rig.relay.client.sent == 150_000, "the relay has the data")
        loopback.reset(rig.server)
        wait_until(lambda: len(rig.lasts) == 2, "both pumps return")
        assert not rig.over.is_set()
        began = time.monotonic()
        rig.relay.abort()
        rig.ended(2)
        assert time.monotonic() - began < 1


def test_patience_is_renewed_by_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "FLUSH_TIMEOUT", 0.4)
    far, near = loopback.pair(receive_buffer=1 << 16)
    with far, near:
        near.setblocking(False)
        assert near.send(bytes(4 << 20)) > 1 << 20
        near.setblocking(True)
        patience, began = Patience(), time.monotonic()
        while time.monotonic() - began < 1.2:
            assert not patience.ended(near)
            far.recv(8192)
            time.sleep(0.005)
        wait_until(lambda: patience.ended(near), "it runs out")
        assert sockets.unacknowledged(near) > 0


@pytest.mark.parametrize("who", ["client", "server"])
@pytest.mark.slow
def test_a_reset_is_noticed_though_the_other_side_never_reads(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pump of the side that resets is stuck in send(), and nobody reads that side."""
    monkeypatch.setattr(relay_module, "FLUSH_TIMEOUT", 0.5)
    with Rig() as rig:
        sender, other = (rig.client, rig.server) if who == "client" else (rig.server, rig.client)
        loopback.fill(sender)
        loopback.reset(sender)
        assert rig.ended().failed is (rig.relay.client if who == "client" else rig.relay.upstream)
        assert loopback.read_to_end(other)[1] == RST


def test_both_sides_reset_at_once() -> None:
    for _ in range(10):
        with Rig() as rig:
            rig.client.sendall(b"x" * 1000)
            rig.server.sendall(b"y" * 1000)
            loopback.reset(rig.client)
            loopback.reset(rig.server)
            relay = rig.ended(2)
            assert relay.failed is not None
            assert not relay.clean
            assert sorted(rig.lasts) == [False, True]


def test_a_reset_that_the_other_pumps_send_consumes_is_not_taken_for_a_fin() -> None:
    """The kernel reports a reset once. Here pump down's send() takes it, and recv() in pump up then says 0."""
    far, near = loopback.pair()
    other = loopback.pair()
    with near, other.far, other.near, select.epoll() as epoll:
        relay = Relay(Leg("client", near), Leg("upstream", other.near), Hangups(epoll), ANYWHERE)
        loopback.reset(far)
        wait_until(lambda: sockets.is_dead(near), "the reset arrives")
        with pytest.raises(ConnectionResetError):
            near.send(b"taken here")
        assert near.recv(1) == b"", "this kernel tells twice: the test has lost its point"
        assert not relay.carry(relay.client, relay.upstream)
        assert relay.failed is relay.client
        assert isinstance(relay.client.error, ConnectionResetError)
        assert not relay.upstream.fin_sent
        assert not relay.clean


def stuck_download(rig: Rig, data: bytes) -> None:
    """The relay has all of `data`, but the client takes next to nothing: pump down is stuck in send()."""
    rig.relay.client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    rig.server.sendall(data)
    wait_until(lambda: sockets.unacknowledged(rig.server) == 0, "the relay's kernel has the data")
    assert rig.relay.client.sent < len(data) - 10_000


def test_what_the_dead_peer_sent_before_it_died_is_still_delivered() -> None:
    """Pump up meets the server's reset in send(); pump down has not read all of the server's data yet."""
    data = loopback.pattern(50_000)
    with Rig(client_buffer=4096) as rig:
        stuck_download(rig, data)
        loopback.reset(rig.server)
        rig.client.send(b"into the reset")
        wait_until(lambda: rig.relay.failed, "pump up sees the reset")
        assert loopback.read_to_end(rig.client) == (data, RST)
        assert rig.ended().failed is rig.relay.upstream
        assert rig.relay.client.sent == len(data)


def test_the_first_failure_is_the_one_that_counts() -> None:
    with Rig(client_buffer=4096) as rig:
        stuck_download(rig, bytes(50_000))
        loopback.reset(rig.server)
        rig.client.send(b"into the reset")
        wait_until(lambda: rig.relay.failed, "pump up sees the reset")
        loopback.reset(rig.client)
        relay = rig.ended(2)
        assert relay.client.error is not None, "the second failure"
        assert relay.failed is relay.upstream


def test_connecting_is_no_idle_time() -> None:
    with Rig() as rig, select.epoll() as epoll:
        client, upstream = Leg("client", rig.client), Leg("upstream", rig.server)
        client.moved_at = upstream.moved_at = time.monotonic() - 100
        assert time.monotonic() - Relay(client, upstream, Hangups(epoll), ANYWHERE).moved_at < 1


# --- resets on a side that nobody reads any more


def test_an_early_answer_then_a_reset_while_the_client_is_silent(rig: Rig) -> None:
    rig.server.sendall(b"413")
    rig.server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.client) == (b"413", FIN)
    loopback.reset(rig.server)
    relay = rig.ended(2)
    assert relay.failed is relay.upstream
    wait_until(lambda: loopback.is_reset(rig.client), "the client is reset")


def test_an_early_answer_then_a_reset_while_the_client_uploads(rig: Rig) -> None:
    rig.server.sendall(b"413")
    rig.server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.client) == (b"413", FIN)
    uploaded = loopback.fill(rig.client)
    assert uploaded > 0
    loopback.reset(rig.server)
    relay = rig.ended(3)
    assert relay.failed is relay.upstream
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        for _ in range(100):
            rig.client.send(bytes(1 << 16))


def test_a_client_that_half_closes_and_resets_while_the_server_is_silent(rig: Rig) -> None:
    rig.client.sendall(b"question")
    rig.client.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.server) == (b"question", FIN)
    loopback.reset(rig.client)
    assert rig.ended(2).failed is rig.relay.client
    wait_until(lambda: loopback.is_reset(rig.server), "the server is reset")


def test_a_reset_on_the_silent_side_does_not_overtake_the_answer() -> None:
    """The answer is still on its way to a slow client that goes on sending. It must get all of it."""
    data = loopback.pattern(150_000)
    with Rig(client_buffer=4096) as rig:
        rig.server.sendall(data)
        rig.server.shutdown(socket.SHUT_WR)
        wait_until(lambda: rig.relay.upstream.eof, "the relay has the answer and its FIN")
        loopback.reset(rig.server)
        parts = bytearray()
        rig.client.settimeout(PATIENCE)
        try:
            while data_now := rig.client.recv(4096):
                parts += data_now
                rig.client.send(b"more")  # which the kernel would answer with a reset, had it been told SHUT_RD
        except (ConnectionResetError, BrokenPipeError):
            pass  # in place of the FIN, or after it: both are the truth
        assert parts == data
        assert rig.ended(3).failed is rig.relay.upstream


def test_our_own_fin_is_no_hang_up(rig: Rig) -> None:
    """Both FINs are through in turn, and a clean end stays clean though the sockets were watched."""
    rig.server.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.client) == (b"", FIN)
    rig.client.sendall(b"late")
    assert loopback.read_exactly(rig.server, 4) == b"late"
    rig.client.close()
    assert loopback.read_to_end(rig.server) == (b"", FIN)
    assert rig.ended().clean


def test_a_watch_that_the_kernel_refuses_is_a_bug_that_resets_both(rig: Rig) -> None:
    """epoll_ctl(2) can fail, for want of memory. Here it does because the descriptor is registered already."""
    rig.epoll.register(rig.relay.client.sock.fileno(), 0)
    rig.client.shutdown(socket.SHUT_WR)
    relay = rig.ended(2)
    assert isinstance(relay.bug, FileExistsError)
    assert not relay.clean
    assert loopback.read_to_end(rig.client)[1] == RST


# --- abort


def test_abort_resets_both_when_nothing_moves(rig: Rig) -> None:
    began = time.monotonic()
    rig.relay.abort()
    assert not rig.ended(2).clean
    assert time.monotonic() - began < 0.5
    assert loopback.read_to_end(rig.client)[1] == loopback.read_to_end(rig.server)[1] == RST


def test_abort_after_a_half_close_resets_both(rig: Rig) -> None:
    rig.client.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.server) == (b"", FIN)
    rig.relay.abort()
    assert not rig.ended(2).clean
    assert loopback.read_to_end(rig.client)[1] == RST
    wait_until(lambda: loopback.is_reset(rig.server), "the server is reset")


def test_abort_while_both_sends_are_stuck() -> None:
    with Rig() as rig:
        loopback.fill(rig.client)
        loopback.fill(rig.server)
        began = time.monotonic()
        rig.relay.abort()
        rig.ended(STUCK + 1)
        assert time.monotonic() - began < STUCK
        wait_until(lambda: loopback.is_reset(rig.client), "the client is reset")
        wait_until(lambda: loopback.is_reset(rig.server), "the server is reset")


def test_abort_in_mid_transfer() -> None:
    with Rig() as rig:
        stop = threading.Event()

        def upload() -> None:
            try:
                while not stop.is_set():
                    rig.client.sendall(bytes(65536))
            except OSError:
                return

        def download() -> None:
            loopback.read_to_end(rig.server)

        peers = [threading.Thread(target=upload), threading.Thread(target=download)]
        for peer in peers:
            peer.start()
        wait_until(lambda: rig.relay.upstream.sent > 1 << 22, "it flows")
        rig.relay.abort()
        rig.ended(STUCK)
        stop.set()
        for peer in peers:
            peer.join(PATIENCE)
            assert not peer.is_alive()


def test_abort_after_the_end_does_not_touch_the_sockets(rig: Rig) -> None:
    rig.client.close()
    rig.server.close()
    rig.ended()
    rig.relay.abort()  # the descriptors are closed, and their numbers may belong to somebody else


def test_a_bug_in_a_pump_resets_both_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_sock: socket.socket) -> None:
        raise RuntimeError("a bug")

    with Rig() as rig:
        monkeypatch.setattr(sockets, "half_close", broken)
        rig.client.shutdown(socket.SHUT_WR)
        relay = rig.ended(2)
        assert isinstance(relay.bug, RuntimeError)
        assert not relay.clean
        assert loopback.read_to_end(rig.client)[1] == loopback.read_to_end(rig.server)[1] == RST


# --- the stream


def test_urgent_data_stays_in_its_place(rig: Rig) -> None:
    rig.client.sendall(b"ab")
    rig.client.send(b"!", socket.MSG_OOB)
    rig.client.sendall(b"cd")
    rig.client.shutdown(socket.SHUT_WR)
    assert loopback.read_to_end(rig.server) == (b"ab!cd", FIN)


def test_single_bytes_pass_at_once(rig: Rig) -> None:
    for number in range(500):
        byte = bytes([number % 256])
        rig.client.send(byte)
        assert rig.server.recv(10) == byte
        rig.server.send(byte)
        assert rig.client.recv(10) == byte
    wait_until(lambda: rig.relay.upstream.sent == rig.relay.client.sent == 500, "both counters have every byte")


def test_a_large_echo_both_ways_at_once(rig: Rig) -> None:
    """With one thread for both directions this deadlocks."""
    data = loopback.pattern(24 << 20)

    def echo() -> None:
        while piece := rig.server.recv(1 << 20):
            rig.server.sendall(piece)
        rig.server.shutdown(socket.SHUT_WR)

    def upload() -> None:
        rig.client.sendall(data)
        rig.client.shutdown(socket.SHUT_WR)

    peers = [threading.Thread(target=echo), threading.Thread(target=upload)]
    rig.server.settimeout(20)
    rig.client.settimeout(20)
    for peer in peers:
        peer.start()
    got, ending = loopback.read_to_end(rig.client, 20)
    for peer in peers:
        peer.join(PATIENCE)
    assert ending == FIN
    assert got == data
    relay = rig.ended()
    assert (relay.upstream.sent, relay.client.sent) == (len(data), len(data))


@pytest.mark.slow
def test_a_reader_that_rests_holds_the_sender_back_and_loses_nothing(rig: Rig) -> None:
    """Longer than one SEND_TICK: the pump's send() returns with nothing or with a part, and goes on."""
    sent = loopback.fill(rig.client)
    assert sent < 64 << 20
    before = rig.relay.upstream.sent
    wait_until(lambda: time.monotonic() - rig.relay.client.moved_at > sockets.SEND_TICK + 0.2, "a tick goes by")
    rig.client.shutdown(socket.SHUT_WR)
    got, ending = loopback.read_to_end(rig.server)
    assert (len(got), ending) == (sent, FIN)
    assert before < sent == rig.relay.upstream.sent


def test_moved_at_tells_of_the_last_byte_in_either_direction(rig: Rig) -> None:
    born = rig.relay.moved_at
    for far, other, leg in ((rig.client, rig.server, rig.relay.client), (rig.server, rig.client, rig.relay.upstream)):
        before = time.monotonic()
        far.sendall(b"x")
        other.recv(1)
        wait_until(lambda: leg.moved_at >= before, "the time is noted")
        assert rig.relay.moved_at == leg.moved_at > born
