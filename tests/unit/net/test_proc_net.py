"""What /proc/net says of sockets that we have opened, and of clients that found no room."""

import os
import socket
from contextlib import ExitStack

import loopback
import pytest
from deadlines import wait_until

from tproxy_relay.intercept import programs
from tproxy_relay.net import proc_net

DEAF = "table ip deaf { chain c { type filter hook input priority 0; tcp flags & (syn | ack) == (syn | ack) drop; }; }"
"""Answers to SYNs do not come."""


@pytest.mark.usefixtures("ipv6_loopback")
def test_the_ports_on_which_somebody_listens() -> None:
    with loopback.listen() as four, loopback.listen("::1") as six, loopback.dial(four.getsockname()) as client:
        ports = {four.getsockname()[1], six.getsockname()[1]}
        assert ports <= proc_net.listening_ports()
        assert client.getsockname()[1] not in proc_net.listening_ports()
    assert not ports & proc_net.listening_ports()


def test_both_ends_of_a_connection_are_there() -> None:
    with loopback.listen() as server, loopback.dial(server.getsockname()) as client, server.accept()[0] as accepted:
        here, there = server.getsockname()[1], client.getsockname()[1]
        found = {one.inode: one for one in proc_net.tcp_sockets() if here in (one.local_port, one.remote_port)}
        for sock, expected in (
            (server, (here, 0, True)),
            (client, (there, here, False)),
            (accepted, (here, there, False)),
        ):
            assert found.pop(str(os.fstat(sock.fileno()).st_ino))[:3] == expected
        assert not found


@pytest.mark.usefixtures("network")
def test_what_finds_no_room_in_a_backlog_is_counted() -> None:
    before = proc_net.listen_overflows()
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(5):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        wait_until(lambda: proc_net.listen_overflows() > before, "some were too many")


@pytest.mark.usefixtures("network")
def test_a_handshake_that_is_not_finished_leaves_a_trace() -> None:
    before = proc_net.unfinished()
    assert before is not None
    with loopback.listen() as server, loopback.dial(server.getsockname()), server.accept()[0]:
        assert proc_net.unfinished() == before, "this one was"
    programs.run(["nft", "-f", "-"], DEAF)
    with loopback.listen() as server, socket.socket() as client:
        client.setblocking(False)
        client.connect_ex(server.getsockname())
        wait_until(lambda: (proc_net.unfinished() or 0) > before, "the answer was sent again")
