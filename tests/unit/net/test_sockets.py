"""Each thing that sockets.py asks of the kernel, seen from the other end or read back from the kernel."""

import socket
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import children
import loopback
import pytest
from deadlines import PATIENCE, wait_until
from loopback import FIN, RST

from tproxy_relay.net import linux, sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import Tuning
from tproxy_relay.settings import Settings

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def number(sock: socket.socket, level: int, name: int) -> int:
    """An option of the kernel."""
    return sock.getsockopt(level, name)


@pytest.mark.parametrize(
    ("keepalive", "interval", "probes"), [(60, 15, 48), (7, 1, 84), (3, 1, 36), (1, 1, 12), (32767, 8191, 48)]
)
def test_an_upstream_socket_is_tuned(keepalive: int, interval: int, probes: int) -> None:
    with sockets.upstream_socket(socket.AF_INET, Tuning(keepalive, 2.5, 0)) as sock:
        assert sock.gettimeout() is None
        assert not sock.get_inheritable()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linux.LINGER.pack(1, 0)
        assert number(sock, socket.SOL_SOCKET, socket.SO_OOBINLINE) == 1
        assert number(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == keepalive
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == interval
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == probes
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 2500
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == linux.pack_timeval(sockets.SEND_TICK)


def test_by_default_an_outage_of_ten_minutes_is_outlived_and_a_dead_peer_is_found_in_a_quarter_of_an_hour() -> None:
    defaults = Settings()
    with sockets.upstream_socket(socket.AF_INET, Tuning(defaults.keepalive, defaults.user_timeout, 0)) as sock:
        idle, interval, probes = (
            number(sock, socket.IPPROTO_TCP, name)
            for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle == defaults.keepalive == 60
        assert (probes - 1) * interval > 600, "the outage may begin with the first probe, and the last one be answered"
        assert idle + probes * interval < 15 * 60
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0, "nor does data that is not acknowledged"


def test_what_is_off_is_left_to_the_kernel() -> None:
    with sockets.upstream_socket(socket.AF_INET, loopback.UNTUNED) as sock:
        assert number(sock, socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert number(sock, socket.SOL_SOCKET, socket.SO_MARK) == 0


@pytest.mark.parametrize(("seconds", "milliseconds"), [(0.0001, 1), (0.25, 250)])
def test_a_tiny_user_timeout_is_not_none(seconds: float, milliseconds: int) -> None:
    with sockets.upstream_socket(socket.AF_INET, Tuning(0, seconds, 0)) as sock:
        assert number(sock, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == milliseconds


PRIVILEGED = """
import socket
from tproxy_relay.net import sockets
from tproxy_relay.net.endpoint import Endpoint
from tproxy_relay.net.sockets import Tuning

for mark in (1, 0x04000000, 0x80000000):
    with sockets.upstream_socket(socket.AF_INET, Tuning(0, 0, mark)) as sock:
        got = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK, 4), "little")
        assert got == mark, hex(got)
for family, host in ((socket.AF_INET, "192.0.2.7"), (socket.AF_INET6, "2001:db8::7")):
    with socket.socket(family) as sock:
        assert not sockets.is_transparent(sock)
        sockets.set_transparent(sock)
        assert sockets.is_transparent(sock)
    for port in (0, 4321):
        with socket.socket(family) as sock, socket.socket(family) as again:
            sockets.bind_foreign(sock, Endpoint(host, port))
            assert sock.getsockname()[:2] == (host, port)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            sockets.bind_foreign(again, Endpoint(host, port))
print("good")
"""


def test_mark_and_foreign_addresses(require_or_skip: Callable[[str], NoReturn]) -> None:
    ran = children.run_python(PRIVILEGED, prefix=children.need(children.NETWORK, require_or_skip))
    assert ran.stdout == "good\n", ran.stderr


UNPRIVILEGED = """
import socket
from tproxy_relay.net import sockets
from tproxy_relay.net.endpoint import Endpoint
for family in (socket.AF_INET, socket.AF_INET6):
    with socket.socket(family) as sock:
        for call in (lambda: sockets.set_transparent(sock), lambda: sockets.set_mark(sock, 1)):
            try:
                call()
            except PermissionError:
                print("refused")
try:
    sockets.upstream_socket(socket.AF_INET, sockets.Tuning(0, 0, 5))
except PermissionError:
    print("refused")
"""


def test_mark_and_foreign_addresses_without_the_capability(require_or_skip: Callable[[str], NoReturn]) -> None:
    prefix = children.need(children.no_capabilities() or ("env",), require_or_skip)
    ran = children.run_python("import warnings; warnings.simplefilter('error')" + UNPRIVILEGED, prefix=prefix)
    assert (ran.stdout, ran.stderr) == ("refused\n" * 5, "")


# --- connect


def test_connect_and_the_timeout_that_is_left_behind() -> None:
    with loopback.listen() as listener, sockets.upstream_socket(socket.AF_INET, loopback.UNTUNED) as sock:
        sockets.connect(sock, Endpoint(*listener.getsockname()), 3.0)
        assert sock.getpeername() == listener.getsockname()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == linux.pack_timeval(sockets.SEND_TICK)


@pytest.mark.parametrize("timeout", [0.1, 0.4])
def test_connect_gives_up_in_time(timeout: float) -> None:
    with loopback.full_backlog() as address, sockets.upstream_socket(socket.AF_INET, loopback.UNTUNED) as sock:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            sockets.connect(sock, Endpoint(*address), timeout)
        assert timeout - 0.05 < time.monotonic() - began < timeout + 1


def test_another_thread_ends_a_connect() -> None:
    with loopback.full_backlog() as address, sockets.upstream_socket(socket.AF_INET, loopback.UNTUNED) as sock:
        errors: list[OSError] = []

        def connect() -> None:
            try:
                sockets.connect(sock, Endpoint(*address), 30.0)
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=connect)
        thread.start()
        wait_until(lambda: sockets.tcp_info(sock).state == 2, "the SYN is out")
        sockets.wake_reader(sock)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert len(errors) == 1 and not isinstance(errors[0], TimeoutError)


# --- the ways to end


def test_an_armed_socket_resets_when_it_is_closed() -> None:
    pair = loopback.pair()
    pair.near.sendall(b"data")
    pair.near.close()
    with pair.far:
        assert loopback.read_to_end(pair.far)[1] == RST


def test_a_disarmed_one_delivers_and_ends_with_a_fin() -> None:
    pair, data = loopback.pair(receive_buffer=4096), loopback.pattern(100_000)
    pair.near.sendall(data)
    sockets.finish_with_fin(pair.near)
    pair.near.close()
    with pair.far:
        assert loopback.read_to_end(pair.far) == (data, FIN)


def test_half_close() -> None:
    pair = loopback.pair()
    with pair.far, pair.near:
        sockets.half_close(pair.near)
        assert loopback.read_to_end(pair.far) == (b"", FIN)
        pair.far.sendall(b"still open")
        assert pair.near.recv(100) == b"still open"


def test_wake_reader_wakes_and_sends_nothing() -> None:
    pair = loopback.pair()
    with pair.far, pair.near:
        got: list[bytes] = []
        thread = threading.Thread(target=lambda: got.append(pair.near.recv(1)))
        thread.start()
        sockets.wake_reader(pair.near)
        thread.join(PATIENCE)
        assert got == [b""]
        pair.far.settimeout(0.1)
        with pytest.raises(TimeoutError):
            pair.far.recv(1)
        pair.near.send(b"x")
        assert pair.far.recv(1) == b"x"


def test_ending_what_has_ended_is_nothing() -> None:
    pair = loopback.pair()
    loopback.reset(pair.far)
    with pair.near:
        wait_until(lambda: sockets.is_dead(pair.near), "the reset arrives")
        sockets.half_close(pair.near)
        sockets.wake_reader(pair.near)
        sockets.finish_with_fin(pair.near)


def test_is_dead_tells_a_reset_from_a_fin() -> None:
    pair = loopback.pair()
    with pair.near:
        assert not sockets.is_dead(pair.near)
        pair.far.shutdown(socket.SHUT_WR)
        assert pair.near.recv(1) == b""
        assert not sockets.is_dead(pair.near)
        loopback.reset(pair.far)
        wait_until(lambda: sockets.is_dead(pair.near), "the reset arrives")


def test_unacknowledged_counts_what_the_peer_has_no_room_for() -> None:
    pair = loopback.pair(receive_buffer=4096)
    with pair.far, pair.near:
        assert sockets.unacknowledged(pair.near) == 0
        pair.near.setblocking(False)
        sent = pair.near.send(bytes(60_000))
        wait_until(lambda: 0 < sockets.unacknowledged(pair.near) < sent, "the peer takes some")
        left = sent
        while left:
            left -= len(pair.far.recv(65536))
        wait_until(lambda: sockets.unacknowledged(pair.near) == 0, "the peer takes all")


def test_tcp_info() -> None:
    pair = loopback.pair()
    with pair.far, pair.near:
        pair.near.sendall(b"x")
        pair.far.recv(1)
        info = sockets.tcp_info(pair.near)
        assert (info.state, info.retransmits) == (1, 0)
        assert 0 < info.rtt_us < 1_000_000


def test_timeouts_of_the_kernel() -> None:
    pair = loopback.pair()
    with pair.far, pair.near:
        sockets.set_receive_timeout(pair.near, 0.1)
        began = time.monotonic()
        with pytest.raises(BlockingIOError):
            pair.near.recv(1)
        assert 0.05 < time.monotonic() - began < 1
        sockets.set_receive_timeout(pair.near, 0)
        assert pair.near.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
        loopback.fill(pair.near)
        pair.near.setblocking(True)
        sockets.set_send_timeout(pair.near, 0.1)
        began = time.monotonic()
        with pytest.raises(BlockingIOError):
            while True:
                pair.near.send(bytes(1 << 20))
        assert 0.05 < time.monotonic() - began < 1.5


# --- whose address


@pytest.mark.parametrize("host", ["127.0.0.1", "127.200.3.4", "0.0.0.0"])
def test_a_local_address(host: str) -> None:
    assert sockets.is_local_address(Endpoint(host, 80))


@pytest.mark.parametrize("host", ["192.0.2.1", "8.8.8.8", "2001:db8::1"])
def test_a_foreign_address(host: str) -> None:
    assert not sockets.is_local_address(Endpoint(host, 80))


@pytest.mark.usefixtures("ipv6_loopback")
def test_a_local_ipv6_address() -> None:
    assert sockets.is_local_address(Endpoint("::1", 80))


def test_a_local_address_is_local_whatever_its_ports_are_used_for() -> None:
    with loopback.listen() as listener:
        assert sockets.is_local_address(Endpoint(*listener.getsockname()))
