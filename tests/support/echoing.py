"""An echo server's part in one connection, for the programs here that serve many."""

import select
import socket

BLOCK = 65536


def echo_some(poll: select.epoll, sock: socket.socket, owed: bytearray) -> bool:
    """One read or one write; False when this connection is over."""
    try:
        if not owed:
            owed += sock.recv(BLOCK)
            if not owed:
                return False
        del owed[: sock.send(owed)]
    except BlockingIOError:
        pass
    except OSError:
        return False
    poll.modify(sock, select.EPOLLOUT if owed else select.EPOLLIN)
    return True
