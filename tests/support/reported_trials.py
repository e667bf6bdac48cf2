"""What users of such programs have reported in public, each as a host to prepare and a trial that says in a short
phrase what the client saw. Both work with a relay on that host and without.

The address of each report is REPORTS[name].
"""

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from interception import PORT

from tproxy_relay.lab import Host, Lab

PATIENCE = 1.6
"""Seconds for an answer, when there may be none: a SYN is sent again after one."""
REPORTS = {
    "rules before ours": "https://github.com/zfl9/ss-tproxy/issues/299",
    "rules for others' marks": "https://github.com/nikkinikki-org/OpenWrt-nikki/issues/88",
    "a way of its own for a client": "https://github.com/opnsense/core/issues/5868",
    "port forward": "https://github.com/kuoruan/luci-app-v2ray/issues/160",
    "redirects": "https://github.com/daeuniverse/dae/issues/691",
    "reserved addresses": "https://github.com/SukkaW/Surge/pull/38",
    "synproxy": "https://github.com/firehol/firehol/issues/454",
    "hop limit": "https://github.com/tracebox/tracebox/issues/59",
    "the same port over UDP": "https://github.com/mitmproxy/mitmproxy/issues/4170",
    "fast open": "https://github.com/shadowsocks/shadowsocks-libev/issues/1376",
    "address on lo": "https://github.com/acassen/keepalived/issues/1827",
    "low port": "https://github.com/n1nj4sec/pupy/issues/439",
    "conntrack forgets": "https://github.com/cloudnativelabs/kube-router/issues/911",
    "server speaks first": "https://github.com/envoyproxy/envoy/issues/166",
    "frozen": "https://github.com/haproxy/haproxy/issues/2251",
    "new address": "https://github.com/aarond10/https_dns_proxy/issues/189",
}

Prepare = Callable[[Lab], None]
Trial = Callable[[Lab, int], str]
_WORDS = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
}
_VIP = {socket.AF_INET: "10.9.9.9", socket.AF_INET6: "fd99::9"}
_ONE_ARM = {socket.AF_INET: "10.81.1.3", socket.AF_INET6: "fd81:1::3"}
_RESERVED = {socket.AF_INET: "240.1.2.3", socket.AF_INET6: "64:ff9b::f001:203"}
"""The second is the first behind NAT64 (RFC 6052)."""
_FASTOPEN_QUEUE = 16
_TCP_MD5SIG = 14
"""linux/tcp.h."""
_TCPI_OPT_SYN_DATA = 32
"""Of tcpi_options: the data in the SYN was acknowledged with it (linux/tcp.h)."""
OTHER = PORT + 1
"""Where a trial has a server of its own."""


def word(error: OSError) -> str:
    """What this error means to a client."""
    return "no answer" if isinstance(error, TimeoutError) else _WORDS.get(error.errno or 0, repr(error))


def exchanged(client: Host, address: str, port: int = PORT) -> str:
    """What comes of a new connection to an echo server."""
    try:
        with client.connect(address, port, PATIENCE) as sock:
            return echoed(sock)
    except OSError as error:
        return word(error)


def gateway(lab: Lab, family: int) -> str:
    """A client to a server, through the relay's host."""
    return exchanged(lab.client, lab.server.address(family))


def to_the_host(lab: Lab, family: int) -> str:
    """A client to a server program on the relay's host."""
    return exchanged(lab.client, lab.relay.address(family))


def echoed(sock: socket.socket, size: int = 2000) -> str:
    """What comes of an exchange on a connection to an echo server."""
    sent = bytes(range(250)) * (size // 250)
    try:
        sock.settimeout(PATIENCE)
        sock.sendall(sent)
        return "served" if _read(sock, len(sent)) == sent else "other bytes"
    except OSError as error:
        return word(error)


def _read(sock: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count and (block := sock.recv(count - len(got))):
        got += block
    return got


def _do(host: Host, *commands: str) -> None:
    for command in commands:
        host.run(["sh", "-c", command])


def _both(command: str) -> tuple[str, str]:
    """The command for both families: {f} in it is the option of `ip`, and {client}, {ours}, {server} are addresses."""
    four = {"f": "-4", "client": "10.81.1.2", "server": "10.81.2.2", "ours": "10.81.1.1"}
    six = {"f": "-6", "client": "fd81:1::2", "server": "fd81:2::2", "ours": "fd81:1::1"}
    return command.format(**four), command.format(**six)


# --- others' rules of routing

RULES_BEFORE_OURS = (
    # NetBird's; wg-quick has the same two, and Tailscale's exit node one of them.
    *_both("ip {f} route add default via {server} table 7120"),
    *_both("ip {f} rule add pref 105 lookup main suppress_prefixlength 0"),
    *_both("ip {f} rule add pref 110 not fwmark 0x1bd00 lookup 7120"),
)
RULES_FOR_MARKS = (
    # mwan3's, on a router with two ways out.
    *_both("ip {f} route add default via {server} table 1"),
    *_both("ip {f} rule add pref 1001 iif rs lookup main"),
    *_both("ip {f} rule add pref 2001 fwmark 0x100/0x3f00 lookup 1"),
    "nft add table inet mwan3",
    "nft 'add chain inet mwan3 marks { type filter hook prerouting priority -151; }'",
    "nft 'add rule inet mwan3 marks iifname rc meta mark set meta mark | 0x100'",
)
ONE_RULE_FOR_MARKS = tuple(one for one in RULES_FOR_MARKS if "iif rs" not in one)
WAY_OF_A_CLIENT = (
    # A client that may use the tunnel only, and the tunnel is down.
    *_both("ip {f} rule add pref 20000 from {client} lookup 300"),
    *_both("ip {f} route add unreachable default table 300"),
)


def with_rules_before_ours(lab: Lab) -> None:
    """A VPN that catches everything before the relay's rules of routing."""
    _do(lab.relay, *RULES_BEFORE_OURS)


def with_rules_for_marks(lab: Lab) -> None:
    """A chooser of uplinks, which marks all that arrives and has rules of routing for its marks."""
    _do(lab.relay, *RULES_FOR_MARKS)


def with_one_rule_for_marks(lab: Lab) -> None:
    """The same, with no other rule of routing before the relay's."""
    _do(lab.relay, *ONE_RULE_FOR_MARKS)


def with_a_way_of_its_own(lab: Lab) -> None:
    """The client's packets, and only those, go by a tunnel that is down."""
    _do(lab.relay, *WAY_OF_A_CLIENT)


# --- a router's port forward


def with_port_forward(lab: Lab) -> None:
    """Who connects to the router's own address, from outside, is sent to the server."""
    four, six = _both("-t nat -A PREROUTING -p tcp -d {ours} --dport 8000 -j DNAT --to-destination {server}")
    _do(lab.relay, f"iptables-nft {four}", f"ip6tables-nft {six}")


# --- a router in the same network as its clients and their way out


def with_one_arm(lab: Lab) -> None:
    """Client, relay and server in one network; the client's way to the server leads through the relay's host."""
    _do(
        lab.relay,
        "ip link add br0 up type bridge nf_call_iptables 0 nf_call_ip6tables 0",
        "sysctl -qw net.ipv4.conf.all.send_redirects=1 net.ipv4.conf.br0.send_redirects=1",
        "sysctl -qew net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0",
        *(f"ip addr flush dev {name} && ip link set {name} master br0" for name in ("rc", "rs")),
        "ip addr add 10.81.1.1/24 dev br0",
    )
    _do(lab.server, f"ip addr add {_ONE_ARM[socket.AF_INET]}/24 dev sr")
    _do(
        lab.client,
        "sysctl -qw net.ipv4.conf.all.accept_redirects=1 net.ipv4.conf.cr.accept_redirects=1",
        f"ip route add {_ONE_ARM[socket.AF_INET]} via 10.81.1.1",
    )


def across_one_arm(lab: Lab) -> str:
    """To the server in the same network, by way of the relay's host."""
    return exchanged(lab.client, _ONE_ARM[socket.AF_INET])


def after_some_datagrams(lab: Lab, _family: int = socket.AF_INET) -> str:
    """The client asks the server something over UDP, a few times; then it connects. IPv4 only."""
    with (
        lab.server.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind(("0.0.0.0", PORT))
        for sock in (server, client):
            sock.settimeout(10)
        for _ in range(5):
            client.sendto(b"?", (_ONE_ARM[socket.AF_INET], PORT))
            asked = server.recvfrom(1)[1]
            server.sendto(b"!", asked)
            client.recv(1)
    return across_one_arm(lab)


# --- addresses


def with_reserved_addresses(lab: Lab) -> None:
    """Made-up or scarce addresses: a proxy's fake ones, or pods in 240.0.0.0/4."""
    for address in _RESERVED.values():
        _do(lab.server, f"ip addr add {address} dev sr {'nodad' if ':' in address else ''}")
        _do(lab.relay, f"ip route add {address} via {'fd81:2::2' if ':' in address else '10.81.2.2'}")


def reserved(lab: Lab, family: int) -> str:
    """To such an address."""
    return exchanged(lab.client, _RESERVED[socket.AddressFamily(family)])


def with_address_on_lo(lab: Lab) -> None:
    """As behind a director that leaves addresses as they are: the service's address is on lo."""
    for address in _VIP.values():
        _do(lab.relay, f"ip addr add {address} dev lo")
        _do(lab.client, f"ip route add {address} via {'fd81:1::1' if ':' in address else '10.81.1.1'}")


def to_the_address_on_lo(lab: Lab, family: int) -> str:
    """To the server program on the relay's host that has it."""
    return exchanged(lab.client, _VIP[socket.AddressFamily(family)])


def moves_to_a_new_address(lab: Lab, family: int) -> str:
    """An exchange, another one after the relay's host got a new address, and one on a new connection."""
    old, new = {
        socket.AF_INET: ("10.81.2.1/24", "10.81.3.1/24"),
        socket.AF_INET6: ("fd81:2::1/64", "fd81:3::1/64"),
    }[socket.AddressFamily(family)]
    plain = new.partition("/")[0]
    with lab.client.connect(lab.server.address(family), PORT, PATIENCE) as sock:
        before = echoed(sock)
        _do(lab.relay, f"ip addr add {new} dev rs {'nodad' if ':' in new else ''}", f"ip addr del {old} dev rs")
        way = f"ip -{6 if ':' in new else 4} route"
        _do(lab.relay, f"{way} replace {lab.server.address(family)} dev rs src {plain}")
        _do(lab.server, f"{way} replace {plain} dev sr", f"{way} replace default via {plain} dev sr onlink")
        sock.settimeout(10)
        try:
            sock.sendall(b"?")
            after = "served" if sock.recv(1) == b"?" else "ended"
        except OSError as error:
            after = word(error)
    return f"{before}, {after}, {exchanged(lab.client, lab.server.address(family))}"


# --- what is in a SYN

SYNPROXY = """\
table inet shield {{
  chain raw {{
    type filter hook prerouting priority raw;
    iifname "rc" tcp dport 8000 tcp flags syn notrack
  }}
  chain {hook} {{
    type filter hook {hook} priority filter;
    iifname "rc" tcp dport 8000 ct state invalid,untracked synproxy mss 1460 wscale 7 timestamp sack-perm
    ct state invalid drop
  }}
}}
"""


def with_synproxy(lab: Lab, hook: str) -> None:
    """The host answers SYNs with cookies in the server's place, before it lets anybody through."""
    _do(lab.relay, "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0")
    lab.relay.run(["nft", "-f", "-"], input=SYNPROXY.format(hook=hook))


def with_one_hop(lab: Lab, family: int) -> str:
    """As traceroute -T begins: a SYN that may not go further than the relay's host."""
    level, option = {
        socket.AF_INET: (socket.IPPROTO_IP, socket.IP_TTL),
        socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
    }[socket.AddressFamily(family)]
    with lab.client.socket(family) as sock:
        sock.setsockopt(level, option, 1)
        sock.settimeout(PATIENCE)
        try:
            sock.connect((lab.server.address(family), PORT))
            return "connected"
        except OSError as error:
            return word(error)


def with_fast_open(lab: Lab) -> None:
    """All three hosts have it."""
    for host in lab.hosts:
        host.set_sysctl("net.ipv4.tcp_fastopen", 3)


@contextlib.contextmanager
def fast_open_server(lab: Lab, family: int) -> Iterator[None]:
    """An echo server of its own that gives out cookies."""
    with lab.server.listen(OTHER, family) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, _FASTOPEN_QUEUE)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    with sock, contextlib.suppress(OSError):
                        while block := sock.recv(65536):
                            sock.sendall(block)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def in_the_syn(lab: Lab, family: int) -> str:
    """What is sent goes with the SYN, if the client has a cookie from before, and else the client asks for one."""
    sent = b"fast" * 200
    with lab.client.socket(family) as sock:
        try:
            sock.sendto(sent, socket.MSG_FASTOPEN, (lab.server.address(family), OTHER))
            sock.settimeout(PATIENCE)
            got = _read(sock, len(sent))
        except OSError as error:
            return word(error)
        options = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5]
    how = "served at once" if options & _TCPI_OPT_SYN_DATA else "served"
    return how if got == sent else "other bytes"


def over_udp(lab: Lab, family: int) -> str:
    """A question over UDP to the same port, as QUIC does it."""
    with lab.server.socket(family, socket.SOCK_DGRAM) as server, lab.client.socket(family, socket.SOCK_DGRAM) as client:
        server.bind((lab.server.address(family), PORT))
        for sock in (server, client):
            sock.settimeout(PATIENCE)
        try:
            client.sendto(b"?", (lab.server.address(family), PORT))
            asked = server.recvfrom(1)[1]
            server.sendto(b"!", asked)
            client.recv(1)
        except OSError as error:
            return word(error)
    return "answered to the client" if asked[0] == lab.client.address(family) else "answered to another"


def signed(lab: Lab, family: int) -> str:
    """Both ends sign their segments with a key (RFC 2385), as routers do between themselves. Not reported, but so."""
    with lab.server.listen(OTHER, family) as listener, lab.client.socket(family) as sock:
        _sign(listener, lab.client.address(family))
        _sign(sock, lab.server.address(family))
        sock.settimeout(PATIENCE)
        try:
            sock.connect((lab.server.address(family), OTHER))
        except OSError as error:
            return word(error)
    return "connected"


def _sign(sock: socket.socket, peer: str) -> None:
    """linux/tcp.h, struct tcp_md5sig: a sockaddr_storage, flags, the length of the key, the key."""
    raw = socket.inet_pton(sock.family, peer)
    head = struct.pack("=HH", sock.family, 0) + (raw if sock.family == socket.AF_INET else bytes(4) + raw)
    key = b"secret"
    text = head.ljust(128, b"\0") + struct.pack("=BBHi", 0, 0, len(key), 0) + key.ljust(80, b"\0")
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG, text)


# --- who the client is


def with_low_ports(host: Host) -> None:
    """Any program of this host may take any port, as root may."""
    host.set_sysctl("net.ipv4.ip_unprivileged_port_start", 0)


def from_a_low_port(lab: Lab, family: int) -> str:
    """To a server that trusts ports below 1024, as NFS does."""
    with lab.server.listen(OTHER, family) as listener, lab.client.socket(family) as sock:
        listener.settimeout(PATIENCE)
        sock.settimeout(PATIENCE)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((lab.client.address(family), 900))
        sock.connect((lab.server.address(family), OTHER))
        server, peer = listener.accept()
        server.close()
        sock.recv(1)  # the server's FIN first: the client's port is free again
        return "trusted" if peer[1] < 1024 else "not trusted"


# --- time


def with_short_memory(lab: Lab) -> None:
    """Conntrack forgets a silent connection after two seconds, as others do after minutes."""
    lab.relay.set_sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", 2)


def after_a_pause(lab: Lab, family: int, pause: float = 4.0) -> str:
    """A program on the relay's host is silent for longer than that, and then goes on."""
    with lab.relay.connect(lab.server.address(family), PORT, PATIENCE) as sock:
        before = echoed(sock)
        time.sleep(pause)  # what is tried is time itself
        return f"{before}, {echoed(sock)}"


def greeted(lab: Lab, family: int) -> str:
    """The server speaks first, as those of SMTP, MySQL and ssh do; the client waits."""
    with lab.server.listen(OTHER, family) as listener:
        listener.settimeout(PATIENCE)
        try:
            with lab.client.connect(lab.server.address(family), OTHER, PATIENCE) as sock:
                server, _ = listener.accept()
                with server:
                    server.sendall(b"220 welcome\r\n")
                    return sock.recv(100).decode().strip()
        except OSError as error:
            return word(error)
