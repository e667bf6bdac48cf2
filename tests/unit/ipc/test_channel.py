"""Messages between processes: whole, in order, with descriptors, and with an end that is always seen."""

import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import children
import pytest
from deadlines import PATIENCE
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import MAX_BYTES, MAX_DESCRIPTORS, Channel

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = channel.pair()
    yield both
    for end in both:
        end.close()


def said(end: Channel) -> channel.Message | None:
    """The next message, which has no descriptors; None for the end."""
    told = end.receive(PATIENCE)
    assert told is None or told[1] == []
    return None if told is None else told[0]


# --- messages


def test_messages_stay_apart_and_in_order(ends: Ends) -> None:
    one, other = ends
    for number in range(20):
        assert one.send({"number": number, "text": "x" * number})
    assert other.send({"back": None})
    assert [said(other) for _ in range(20)] == [{"number": n, "text": "x" * n} for n in range(20)]
    assert said(one) == {"back": None}


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=5))
@hypothesis_settings(max_examples=100, deadline=None)
def test_whatever_is_said_is_heard(message: channel.Message) -> None:
    one, other = channel.pair()
    assert one.send(message)
    assert said(other) == message
    one.close()
    other.close()


def test_the_longest_message(ends: Ends) -> None:
    one, other = ends
    frame = len('{"text":""}')
    longest = {"text": "x" * (MAX_BYTES - frame)}
    assert one.send(longest)
    assert said(other) == longest
    with pytest.raises(ValueError, match=f"a message of {MAX_BYTES + 1} bytes and 0 descriptors is too long"):
        one.send({"text": "x" * (MAX_BYTES - frame + 1)})
    assert one.send({"still": "alive"})
    assert said(other) == {"still": "alive"}


def test_one_that_does_not_read_holds_nobody_up(ends: Ends) -> None:
    one, other = ends
    sent, began = 0, time.monotonic()
    while one.send({"number": sent}):
        sent += 1
        assert sent < 100_000, "no end to what it takes"
    assert sent > 10
    assert time.monotonic() - began < PATIENCE
    assert [said(other) for _ in range(sent)] == [{"number": number} for number in range(sent)]
    assert one.send({"room": "again"})
    assert said(other) == {"room": "again"}


def test_nothing_is_said_for_a_while(ends: Ends) -> None:
    one, other = ends
    with pytest.raises(TimeoutError):
        other.receive(0.01)
    assert one.send({"then": 1})
    assert said(other) == {"then": 1}
    assert os.get_blocking(other.fileno()), "it waits again"


# --- descriptors


def test_descriptors_arrive_with_their_message(ends: Ends) -> None:
    one, other = ends
    pipes = [os.pipe() for _ in range(3)]
    try:
        assert one.send({"which": 1}, [pipes[0][0]])
        assert one.send({"which": 0})
        assert one.send({"which": 2}, [pipes[2][0], pipes[1][0]])
        for _, write in pipes:
            os.write(write, str(write).encode())
        got = [other.receive(PATIENCE) for _ in range(3)]
        assert [told and (told[0]["which"], len(told[1])) for told in got] == [(1, 1), (0, 0), (2, 2)]
        descriptors = [fd for told in got if told for fd in told[1]]
        assert [int(os.read(fd, 10)) for fd in descriptors] == [pipes[0][1], pipes[2][1], pipes[1][1]]
        assert not any(os.get_inheritable(fd) for fd in descriptors), "children get what they are to get"
        for fd in descriptors:
            os.close(fd)
    finally:
        for read, write in pipes:
            os.close(read)
            os.close(write)


def test_as_many_descriptors_as_the_kernel_allows(ends: Ends) -> None:
    one, other = ends
    with open(os.devnull, encoding="ascii") as file:
        assert one.send({}, [file.fileno()] * MAX_DESCRIPTORS)
        with pytest.raises(ValueError, match="254 descriptors is too long"):
            one.send({}, [file.fileno()] * (MAX_DESCRIPTORS + 1))
    told = other.receive(PATIENCE)
    assert told is not None
    assert len(told[1]) == MAX_DESCRIPTORS
    for fd in told[1]:
        os.close(fd)


def test_a_descriptor_that_is_closed_already_is_no_message(ends: Ends) -> None:
    one, other = ends
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    assert not one.send({"what": "?"}, [fd])
    with pytest.raises(TimeoutError):
        other.receive(0.01)


# --- the end


def test_the_end(ends: Ends) -> None:
    one, other = ends
    assert one.send({"last": "words"})
    one.close()
    assert said(other) == {"last": "words"}
    assert said(other) is None
    assert said(other) is None
    assert not other.send({"too": "late"}), "and no SIGPIPE"


def test_the_end_of_one_that_has_not_read_everything(ends: Ends) -> None:
    """unix(7): its end is a reset then."""
    one, other = ends
    assert other.send({"never": "read"})
    one.close()
    assert said(other) is None
    assert not other.send({"too": "late"})


CHILD = """
import os, signal, sys
from tproxy_relay.ipc import channel
end = channel.adopt(int(sys.argv[1]))
assert not os.get_inheritable(end.fileno())
end.send({"pid": os.getpid()})
end.receive()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_end_of_a_killed_process(ends: Ends) -> None:
    one, other = ends
    fd = fcntl.fcntl(other.fileno(), fcntl.F_DUPFD, 100)  # without FD_CLOEXEC
    other.close()
    try:
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", CHILD, str(fd)], children.environment())
    finally:
        os.close(fd)
    assert said(one) == {"pid": pid}
    assert one.send({"die": True})
    assert said(one) is None
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_what_is_no_socket_is_not_adopted() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(OSError, match="socket"):
            channel.adopt(read)
    finally:
        os.close(read)
        os.close(write)


# --- what is no message


NO_MESSAGES = {
    "not JSON": b"hello",
    "half of it": b'{"a": ',
    "no UTF-8": b"\xff\xfe\xfd",
    "not an object": b"[1, 2]",
    "a word": b'"text"',
    "a number without end": b'{"a": ' + b"9" * 5_000 + b"}",
    "too deep": b"[" * 100_000,
    "too long": b'{"text": "' + b"x" * MAX_BYTES + b'"}',
}


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, Channel]]:
    """One end that says whatever it likes, and the other."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        yield one, Channel(other)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("data", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_what_is_no_message(data: bytes, raw: tuple[socket.socket, Channel]) -> None:
    """A worker that somebody has taken over may say anything: one error for all of it, and nothing is left open."""
    stranger, end = raw
    before = open_files()
    for descriptors in ([], [stranger.fileno()] * 5):
        socket.send_fds(stranger, [data], descriptors)
        with pytest.raises(ValueError, match="."):
            end.receive(PATIENCE)
    stranger.send(b'{"then": "sense"}')
    assert said(end) == {"then": "sense"}
    assert open_files() == before


def test_an_empty_packet_leaves_nothing_open(raw: tuple[socket.socket, Channel]) -> None:
    """It looks like the end."""
    stranger, end = raw
    before = open_files()
    socket.send_fds(stranger, [b""], [stranger.fileno()] * 3)
    assert end.receive(PATIENCE) is None
    assert open_files() == before
