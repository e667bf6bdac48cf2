"""What becomes of a live connection when somebody empties the kernel's table of connections (`conntrack -F`)."""

import contextlib
import select
import socket

from interception import PORT, ways

from tproxy_relay.lab import Lab

LIVES = "lives"
LOST = "ConnectionResetError"
"""Whoever sent first: its packet went past the relay, to one who knows nothing of it."""


def live_connection(lab: Lab, topology: str, family: int) -> tuple[socket.socket, socket.socket]:
    """A client and a server that have exchanged something, each way."""
    source, destination = ways(lab)[topology]
    with destination.listen(PORT, family) as listener:
        listener.settimeout(10)
        client = source.connect(destination.address(family), PORT)
        server, _ = listener.accept()
    server.settimeout(3)
    client.settimeout(3)
    assert exchange(client, server) == exchange(server, client) == LIVES
    return client, server


def after_flush(lab: Lab, ends: tuple[socket.socket, socket.socket], first: str) -> str:
    """`lives`, or what the ends saw, when `first` (client or server) is the first to send after the table was
    emptied."""
    client, server = ends
    lab.relay.run(["conntrack", "-F"])
    order = ((client, server), (server, client))
    for sender, receiver in order if first == "client" else order[::-1]:
        saw = exchange(sender, receiver)
        if saw != LIVES:
            return saw
    return LIVES


def exchange(sender: socket.socket, receiver: socket.socket) -> str:
    """One message, one way: `lives`, or what the first end saw that saw anything else. Nobody else sends meanwhile."""
    try:
        sender.sendall(b"x" * 1000)
        got = b""
        while len(got) < 1000:
            readable = select.select([receiver, sender], [], [], receiver.gettimeout())[0]
            if not readable:
                raise TimeoutError
            block = readable[0].recv(1000 - len(got))
            if not block:
                return "end of file"
            got += block
    except OSError as error:
        return type(error).__name__
    return LIVES


def close(ends: tuple[socket.socket, socket.socket]) -> None:
    """Both of them, whatever they have met."""
    for end in ends:
        with contextlib.suppress(OSError):
            end.close()
