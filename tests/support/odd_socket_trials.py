"""What is not like others: sockets that are bound to a device, an interface without an address.

Each trial makes one connection and says in a few words what the client saw; with a relay in between, or without.
"""

import socket

from interception import PORT, ping

from tproxy_relay.lab import Host, Lab


def bound_to_device(lab: Lab, family: int) -> str:
    """What a program on the relay's host sees whose socket is bound to the interface towards the server
    (SO_BINDTODEVICE: `curl --interface rs`, NetworkManager's connectivity check)."""
    with _bound(lab, family) as sock:
        return _exchange(sock, lab.server, family)


def connected(lab: Lab, family: int) -> socket.socket:
    """A connection to the server by such a socket, which has been of use."""
    sock = _bound(lab, family)
    seen = _exchange(sock, lab.server, family)
    assert seen == "answered", seen
    return sock


def by_interface_without_address(lab: Lab, family: int) -> str:
    """What a client sees that is connected to the relay's host by an interface that has no address, after
    `take_address`."""
    with lab.client.socket(family) as sock:
        return _exchange(sock, lab.server, family)


def take_address(lab: Lab) -> None:
    """The addresses of the clients' interface become another one's, as they are on a point-to-point line or with proxy
    ARP. The way stays open."""
    moves = """\
addr flush dev rc
addr add 10.81.1.1/32 dev rs
addr add fd81:1::1/128 dev rs nodad
route add 10.81.1.2/32 dev rc
route add fd81:1::2/128 dev rc
neigh replace fd81:1::2 lladdr {client} dev rc
"""
    lab.relay.set_sysctl("net.ipv6.conf.rc.addr_gen_mode", 1)
    lab.relay.run(["ip", "-batch", "-"], input=moves.format(client=_link_address(lab.client, "cr")))
    neighbour = f"neigh replace fd81:1::1 lladdr {_link_address(lab.relay, 'rc')} dev cr\n"
    lab.client.run(["ip", "-batch", "-"], input=neighbour)


def _link_address(host: Host, interface: str) -> str:
    words = host.run(["ip", "-o", "link", "show", "dev", interface]).stdout.split()
    return words[words.index("link/ether") + 1]


def _bound(lab: Lab, family: int) -> socket.socket:
    sock = lab.relay.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"rs")
    return sock


def _exchange(sock: socket.socket, server: Host, family: int) -> str:
    sock.settimeout(5)
    try:
        sock.connect((server.address(family), PORT))
    except OSError as error:
        return type(error).__name__ if error.errno is None else error.strerror
    return ping(sock) or "answered"
