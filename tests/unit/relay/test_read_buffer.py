"""What a pump reads with: its size follows the stream, and a mapping is there only as long as it is needed."""

import gc
import mmap
import socket
import threading

import loopback
import pytest
from deadlines import PATIENCE, wait_until
from rigs import ANYWHERE, Rig

from tproxy_relay.relay import read_buffer
from tproxy_relay.relay.read_buffer import BULK_READ, LARGE_READ, SMALL_READ, ReadBuffer

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Maps:
    """The mappings that the relay makes: their sizes, and how many are still there."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.alive = 0


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> Maps:
    """Counts every mapping from its making to its end, which comes with the last view of it."""
    counted = Maps()

    class CountedMap(mmap.mmap):
        def __new__(cls, *args: int) -> "CountedMap":
            made = super().__new__(cls, *args)
            counted.sizes.append(len(made))
            counted.alive += 1
            return made

        def __del__(self) -> None:
            counted.alive -= 1

    monkeypatch.setattr(mmap, "mmap", CountedMap)
    return counted


def read_size(reader: ReadBuffer, far: socket.socket, near: socket.socket, count: int) -> int:
    """How much one read takes when `count` bytes wait."""
    far.sendall(bytes(count))
    wait_until(lambda: waiting(near) >= count, "the data arrives")
    return len(reader.read())


def waiting(near: socket.socket) -> int:
    """Bytes in the receive queue, as far as one look shows."""
    try:
        return len(near.recv(1 << 21, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return 0


def test_a_reader_grows_with_the_stream_and_shrinks_with_it(maps: Maps) -> None:
    far, near = loopback.pair()
    with far, near:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        reader = ReadBuffer(near, ANYWHERE)
        assert read_size(reader, far, near, SMALL_READ + 100) == SMALL_READ
        assert len(reader.read()) == 100  # short, so small again
        assert read_size(reader, far, near, 3 * SMALL_READ) == SMALL_READ
        assert len(reader.read()) == 2 * SMALL_READ
        far.sendall(bytes(LARGE_READ * 3))
        wait_until(lambda: waiting(near) == LARGE_READ * 3, "the data arrives")
        sizes: list[int] = []
        while sum(sizes) < LARGE_READ * 3:
            sizes.append(len(reader.read()))
        assert sizes[:3] == [4096, 16384, LARGE_READ]
        assert sizes[3] == LARGE_READ * 3 - sum(sizes[:3]) > LARGE_READ
        assert maps.alive == 1
        reader.rest()
        assert maps.alive == 0
        assert read_size(reader, far, near, 5000) == SMALL_READ


def test_the_bulk_buffer_is_given_back_when_the_stream_trickles(maps: Maps) -> None:
    with Rig() as rig:
        threading.Thread(target=rig.client.sendall, args=(bytes(8 << 20),)).start()
        loopback.read_exactly(rig.server, 8 << 20)
        assert maps.alive == 1
        for _ in range(read_buffer.SMALL_READS_IN_BULK + 1):
            rig.client.sendall(b"x")
            loopback.read_exactly(rig.server, 1)
        wait_until(lambda: maps.alive == 0, "the mapping is given back")


def test_the_bulk_buffer_is_given_back_when_the_stream_rests(maps: Maps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_buffer, "BULK_REST", 0.2)
    with Rig() as rig:
        threading.Thread(target=rig.client.sendall, args=(bytes(8 << 20),)).start()
        loopback.read_exactly(rig.server, 8 << 20)
        assert maps.alive == 1
        assert maps.sizes == [BULK_READ]
        wait_until(lambda: maps.alive == 0, "the mapping is given back")
        assert not rig.over.is_set()
        sock = rig.relay.client.sock
        wait_until(
            lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16),
            "a resting reader sleeps and does not poll",
        )
        rig.client.sendall(b"on we go")
        assert loopback.read_exactly(rig.server, 8) == b"on we go"


@pytest.mark.parametrize("ending", ["fin", "reset", "abort"])
def test_nothing_of_an_ended_relay_waits_for_the_garbage_collector(maps: Maps, ending: str) -> None:
    """An exception that is kept has a traceback, and that has the frame with the bulk buffer in it."""
    gc.collect()
    gc.disable()
    try:
        with Rig() as rig:
            threading.Thread(target=rig.client.sendall, args=(bytes(8 << 20),)).start()
            loopback.read_exactly(rig.server, 8 << 20)
            if ending == "fin":
                rig.client.close()
                rig.server.close()
            elif ending == "reset":
                loopback.reset(rig.client)
            else:
                rig.relay.abort()
            rig.ended()
        wait_until(lambda: maps.alive == 0, "the bulk buffer is unmapped")
    finally:
        gc.enable()


def test_without_room_for_a_mapping_the_stream_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_args: int) -> None:
        raise MemoryError

    monkeypatch.setattr(mmap, "mmap", no_room)
    data = loopback.pattern(4 << 20)
    with Rig() as rig:
        sender = threading.Thread(target=rig.client.sendall, args=(data,))
        sender.start()
        assert loopback.read_exactly(rig.server, len(data)) == data
        sender.join(PATIENCE)
