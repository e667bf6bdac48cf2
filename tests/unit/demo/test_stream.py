"""The two ends of the throughput measurement, as the programs that they are."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import loopback
import pytest
from deadlines import PATIENCE
from loopback import Pair

from tproxy_relay.demo import stream


@pytest.fixture
def pair() -> Iterator[Pair]:
    with loopback.listen() as listener:
        far = loopback.dial(listener.getsockname()[:2])
        near = listener.accept()[0]
    with far, near:
        for sock in (far, near):
            sock.settimeout(None)  # the programs share the open file, and block
        yield Pair(far, near)


def program(sock: socket.socket, *arguments: object) -> "subprocess.Popen[bytes]":
    role, *rest = map(str, arguments)
    command = [sys.executable, "-I", "-S", stream.__file__, role, str(sock.fileno()), *rest]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(sock.fileno(),))


def test_what_one_sends_the_other_counts(pair: Pair) -> None:
    with program(pair.near, "receive") as receiver, program(pair.far, "send", 0.2) as sender:
        pair.far.close()
        pair.near.close()  # the ends are theirs alone
        said, complaints = receiver.communicate(timeout=PATIENCE)
        assert sender.wait(PATIENCE) == receiver.returncode == 0 and complaints == b""
    total, seconds = said.split()
    assert int(total) >= stream.CHUNK and 0.1 < float(seconds) < PATIENCE


def test_the_time_begins_with_the_first_byte(pair: Pair) -> None:
    with program(pair.near, "receive") as receiver:
        time.sleep(0.5)
        began = time.monotonic()
        pair.far.sendall(b"x" * 1000)
        pair.far.sendall(b"x" * 1000)
        pair.far.shutdown(socket.SHUT_WR)
        said, _ = receiver.communicate(timeout=PATIENCE)
        most = time.monotonic() - began
    total, seconds = said.split()
    assert int(total) == 2000 and 0 <= float(seconds) <= most


@pytest.mark.parametrize("role", [("receive",), ("send", 60)], ids=["receive", "send"])
def test_a_connection_that_breaks_is_an_exit_code_and_no_traceback(pair: Pair, role: tuple[object, ...]) -> None:
    with program(pair.near, *role) as end:
        pair.near.close()
        pair.far.sendall(b"x")
        loopback.reset(pair.far)
        said, complaints = end.communicate(timeout=PATIENCE)
    assert (end.returncode, said, complaints) == (1, b"", b"")
