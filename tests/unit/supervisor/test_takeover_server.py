"""A running relay that is asked to hand over, by a test in the place of the next relay. Whatever it is asked, it and
its connections live on."""

import os
import signal
import socket
from pathlib import Path

import pytest
from deadlines import wait_until
from relays import Relay
from successor import answer, asking, question

from tproxy_relay.ipc.channel import Message
from tproxy_relay.supervisor import takeover_server

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def asked(relay: Relay) -> Message:
    """What it says to one more."""
    with asking(relay) as channel:
        return question(channel) or {}


def refusal(message: Message | None) -> object:
    """Why it does not."""
    assert message is not None
    return message["refused"]


def commit(relay: Relay, pid: object = None, kept: object = None) -> Message:
    """Take everything."""
    return {
        "commit": os.getpid() if pid is None else pid,
        "kept": [f"127.0.0.1:{relay.port}"] if kept is None else kept,
    }


def lives(relay: Relay, ends: tuple[socket.socket, socket.socket]) -> None:
    """The relay goes on, and so does this connection."""
    client, server = ends
    client.sendall(b"on")
    assert server.recv(2) == b"on"
    assert relay.process.returncode is None, relay.process.log


def test_it_offers_its_listeners_and_hands_them_over(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay:
        ends = relay.connect()
        with asking(relay) as channel:
            offered = question(channel)
            assert offered is not None and offered["listeners"] == [["127.0.0.1", relay.port, 0]]
            channel.send(commit(relay))
            assert answer(channel) == {"committed": relay.process.pid}
        relay.said("handed over")
        lives(relay, ends)
        ends[0].close()
        ends[1].close()
        relay.process.wait()
        assert relay.process.returncode == 0


def test_one_that_is_turned_away_in_the_moment_of_the_hand_over(tmp_path: Path) -> None:
    """Both are heard in the same turn of the loop, and the first closes the door."""
    with Relay(tmp_path) as relay:
        ends = relay.connect()
        with asking(relay) as first, asking(relay) as second:
            assert question(first)
            os.kill(relay.process.pid, signal.SIGSTOP)
            first.send(commit(relay))
            second.send({"want": "listeners", "protocol": takeover_server.PROTOCOL})
            os.kill(relay.process.pid, signal.SIGCONT)
            assert answer(first) == {"committed": relay.process.pid}
        relay.said("handed over")
        lives(relay, ends)


def test_no_worker_is_replaced_after_the_hand_over(tmp_path: Path) -> None:
    """The listeners are closed by then."""
    with Relay(tmp_path, workers=4) as relay, asking(relay) as channel:
        held = [relay.connect() for _ in range(12)]
        assert question(channel)
        for number in range(3):
            os.kill(relay.process.workers[0], signal.SIGKILL)
            relay.said("worker ended", number + 1)
        channel.send(commit(relay))
        assert answer(channel) == {"committed": relay.process.pid}
        relay.said("handed over")
        wait_until(lambda: len(relay.process.workers) < 4, "those that have nothing to do end")
        for client, server in held:
            client.close()
            server.close()
        relay.process.wait()
        assert relay.process.returncode == 0, relay.process.log


@pytest.mark.parametrize("pid, kept", [("1", None), (None, "all"), (None, 7), (1.5, None)])
def test_a_commit_that_it_does_not_understand(tmp_path: Path, pid: object, kept: object) -> None:
    with Relay(tmp_path) as relay, asking(relay) as channel:
        ends = relay.connect()
        assert question(channel)
        channel.send(commit(relay, pid, kept))
        assert refusal(answer(channel)) == "it is of another version"
        lives(relay, ends)
        relay.connect()


def test_one_of_another_version(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay:
        for asked in ({"want": "listeners"}, {"want": "listeners", "protocol": 0}, {"hello": "there"}):
            with asking(relay) as channel:
                channel.send(asked)
                assert refusal(answer(channel)) == "it is of another version"
        assert relay.process.returncode is None


def test_one_that_has_given_up_gets_nothing(tmp_path: Path) -> None:
    with Relay(tmp_path) as relay:
        ends = relay.connect()
        with asking(relay) as channel:
            assert question(channel)
            os.kill(relay.process.pid, signal.SIGSTOP)
            channel.send(commit(relay))
            channel.shut()
            os.kill(relay.process.pid, signal.SIGCONT)
            wait_until(lambda: "refused" not in asked(relay), "it has been turned away")
        lives(relay, ends)
        relay.connect()


def test_one_with_more_listeners_than_a_message_can_take(tmp_path: Path) -> None:
    ports = ",".join(str(20_001 + number) for number in range(64))
    ours = f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}"  # another run of this may be under way
    bind = ",".join(f"{ours}.{number}" for number in range(1, 5))
    with Relay(tmp_path, bind=bind, ports=ports, inbound_port=20_001, outbound_port=20_001) as relay:
        with asking(relay) as channel:
            assert refusal(question(channel)) == "it has more than 253 listeners"
        assert relay.process.returncode is None
