"""What a service manager does with a socket unit (sd_listen_fds(3)): sockets from descriptor 3 on, then the relay."""

import sys

_LAUNCHER = """
import os, socket, sys
count = sys.argv.index("--") - 1
for fd, listener in enumerate(sys.argv[1 : count + 1], 103):
    host, port, *options = listener.split(",")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if ":" in host:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, "dual-stack" not in options)
    if "transparent" in options:  # IPV6_TRANSPARENT, IP_TRANSPARENT
        sock.setsockopt(*((socket.IPPROTO_IPV6, 75, 1) if ":" in host else (socket.SOL_IP, 19, 1)))
    sock.bind((host, int(port)))
    sock.listen(100)
    os.dup2(sock.fileno(), fd)
    sock.close()
for fd in range(3, 3 + count):
    os.dup2(fd + 100, fd)
os.environ.update(LISTEN_FDS=str(count), LISTEN_PID=str(os.getpid()))
os.execvp(sys.argv[count + 2], sys.argv[count + 2 :])
"""


def passing(*listeners: str) -> tuple[str, ...]:
    """The command that opens these listeners and becomes the command that follows it. Each is `HOST,PORT`, and
    perhaps `,transparent` and `,dual-stack`."""
    return (sys.executable, "-c", _LAUNCHER, *listeners, "--")
