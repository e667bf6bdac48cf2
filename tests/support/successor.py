"""A test in the place of the next relay, which asks the one that runs."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from deadlines import PATIENCE
from relays import Relay

from tproxy_relay.ipc.channel import Channel, Message
from tproxy_relay.supervisor import takeover_server


@contextmanager
def asking(relay: Relay) -> Iterator[Channel]:
    """Someone who may ask."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(f"\0{takeover_server.NAME}{relay.process.pid}")
        yield Channel(sock)


def question(channel: Channel) -> Message | None:
    """What it offers or says."""
    channel.send({"want": "listeners", "protocol": takeover_server.PROTOCOL})
    return answer(channel)


def answer(channel: Channel) -> Message | None:
    told = channel.receive(PATIENCE)
    if told is None:
        return None
    for fd in told[1]:
        os.close(fd)
    return told[0]
