"""Which interface clients of a listener come in by, held to by a socket filter (socket(7), SO_ATTACH_FILTER).

Packets that come in by another one are dropped before the kernel answers them. SO_BINDTODEVICE would do that too, but
connections inherit it, and with it the number of the interface: when that is deleted and made again (pppd, wg-quick,
hotplug) they would be lost, while direct ones live on. A filter can be taken off the connections that were accepted,
and can wait for an interface that is not there.
"""

import array
import contextlib
import socket

from tproxy_relay.net import linux

NOWHERE = 0
"""The number of no interface."""


def keep_to(sock: socket.socket, index: int) -> None:
    """Let in only what arrives by the interface of this number, from now on; NOWHERE: nothing. Where a filter takes
    CAP_NET_ADMIN (Linux 6.18) and there is none, the socket is bound to the interface instead: the first time that
    takes no capability, later CAP_NET_RAW. Raises OSError."""
    filtered, bound = _filter(sock, index), bound_to(sock)
    if index != NOWHERE and bound != index and (bound or not filtered):
        sock.setsockopt(socket.SOL_SOCKET, linux.SO_BINDTOIFINDEX, index)
    elif not filtered and not bound:
        raise PermissionError("an interface that is not there can be waited for with CAP_NET_ADMIN only")


def open_to_all(sock: socket.socket) -> None:
    """Take the filter off a listener, or off a connection, which has that of its listener. It is no error if there is
    none."""
    with contextlib.suppress(FileNotFoundError):
        sock.setsockopt(socket.SOL_SOCKET, linux.SO_DETACH_FILTER, 0)


def bound_to(sock: socket.socket) -> int:
    """The number of the interface that it is bound to (SO_BINDTODEVICE); 0: to none."""
    return sock.getsockopt(socket.SOL_SOCKET, linux.SO_BINDTOIFINDEX)


def _filter(sock: socket.socket, index: int) -> bool:
    """In the place of the filter that is there, at once. False if this process may not."""
    steps = _accept_only(index)
    program = array.array("B", b"".join(steps))
    address, _ = program.buffer_info()
    try:
        sock.setsockopt(socket.SOL_SOCKET, linux.SO_ATTACH_FILTER, linux.SOCK_FPROG.pack(len(steps), address))
    except PermissionError:
        return False
    return True


def _accept_only(index: int) -> list[bytes]:
    """The program: the interface's number, is it that one, all of the packet, or nothing of it."""
    nothing = linux.SOCK_FILTER.pack(linux.BPF_RET, 0, 0, 0)
    if index == NOWHERE:
        return [nothing]
    return [
        linux.SOCK_FILTER.pack(linux.BPF_LD_W_ABS, 0, 0, linux.SKF_AD_IFINDEX),
        linux.SOCK_FILTER.pack(linux.BPF_JEQ_K, 0, 1, index),
        linux.SOCK_FILTER.pack(linux.BPF_RET, 0, 0, 0xFFFFFFFF),
        nothing,
    ]
