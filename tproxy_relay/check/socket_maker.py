"""A process that does nothing but live in a network namespace and open sockets there for its maker.

Run as a file, by the interpreter alone: nothing of the package is imported. It ends with its control socket, and the
namespace, with all that is in it, ends with it.
"""

import os
import socket
import sys


def main() -> None:
    """One byte asks for a socket: its value is the family. The answer carries the descriptor, or the errno."""
    control = socket.socket(fileno=int(sys.argv[1]))
    control.send(b"ready")
    while request := control.recv(1):
        try:
            with socket.socket(request[0], socket.SOCK_STREAM) as made:
                socket.send_fds(control, [b"\0"], [made.fileno()])
        except OSError as error:
            control.send(bytes([error.errno or 0]))


if __name__ == "__main__":
    try:
        main()
    except OSError:
        os._exit(1)  # the maker is gone
