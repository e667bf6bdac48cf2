"""Both ends of the throughput measurement, over a pair of sockets, and as programs."""

import socket
import subprocess
import sys
import threading

from tproxy_relay.demo import stream


def test_what_is_sent_is_counted() -> None:
    one, other = socket.socketpair()
    with one, other:
        sender = threading.Thread(target=stream.send, args=(one, 0.05))
        sender.start()
        total, seconds = stream.receive(other)
        other.shutdown(socket.SHUT_WR)
        sender.join(20)
        assert not sender.is_alive() and total > 0 and total % stream.CHUNK == 0 and seconds < 20


def test_as_programs() -> None:
    one, other = socket.socketpair()
    with one, other:
        command = [sys.executable, "-I", "-S", stream.__file__]
        receiver = subprocess.Popen(
            [*command, "receive", str(other.fileno())], pass_fds=[other.fileno()], stdout=subprocess.PIPE
        )
        sender = subprocess.Popen([*command, "send", str(one.fileno()), "0.05"], pass_fds=[one.fileno()])
    with receiver, sender:
        said, _ = receiver.communicate(timeout=60)
        total, seconds = said.split()
        assert int(total) > 0 and float(seconds) > 0 and sender.wait(60) == receiver.returncode == 0
