"""Interception beside what others do on the same host, and rows of the matrix that test_topologies.py does not have.

Each connection's way is proven by the relay's record of it, or by the lack of one and by the peer that the server saw.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import NoReturn

import pytest
from deadlines import wait_until
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, EchoServer, echo_servers, opened, ping, ways
from rows import Seen
from topologies import HOSTILE

from tproxy_relay.lab import Host, Lab, LabError, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

PUBLISHED = 8001
"""Where the published port leads to."""

EVERY_BACKEND = [pytest.param(name, marks=[] if name == "nft" else pytest.mark.slow) for name in BACKENDS]


def talk(relay: RelayProcess, client: Host, address: str, port: int = PORT) -> dict[str, object]:
    """An exchange with an echo server, and the relay's record of it."""
    with client.connect(address, port, timeout=5) as sock:
        assert ping(sock) == ""
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        return relay.record_of(sock)


def directly(client: Host, address: str, port: int = PORT) -> None:
    """An exchange with an echo server that the relay should have nothing to do with: what it has taken is counted when
    it has ended, and its log with it."""
    with client.connect(address, port, timeout=5) as sock:
        assert ping(sock) == ""


# --- more rows of the matrix

ROWS = [
    *((backend, True, ("--mode", "redirect")) for backend in BACKENDS),
    *((backend, False, ("--mode", "redirect", "--preserve-source", "address")) for backend in BACKENDS),
    *((backend, True, ("--mode", "redirect", "--preserve-source", "full")) for backend in BACKENDS),
    *((backend, True, ("--bind", "127.0.0.1,::1", "--preserve-source", "address")) for backend in BACKENDS),
    *(
        (backend, True, ("--mark-mask", "0x70", "--route-table", "99", "--route-priority", "77"))
        for backend in BACKENDS
    ),
    *((backend, False, ("--bind", "10.81.1.1,fd81:1::1", "--intercept-inbound", "1-14999")) for backend in BACKENDS),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(row, id=" ".join([row[0], "hostile" if row[1] else "normal", *row[2]]), marks=pytest.mark.slow)
        for row in ROWS
    ],
)
def stage(
    request: pytest.FixtureRequest, require_or_skip: Callable[[str], NoReturn]
) -> Iterator[tuple[Lab, RelayProcess]]:
    backend, hostile, options = request.param
    with contextlib.ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab())
        except LabError as error:
            require_or_skip(str(error))
        for name, value in HOSTILE.items() if hostile else ():
            lab.relay.set_sysctl(name, value)
        stack.enter_context(echo_servers(lab))
        yield lab, stack.enter_context(lab.relay_process(*BOTH_WAYS, "--backend", backend, *options))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("way", ["gateway", "host", "local"])
def test_a_row_more(stage: tuple[Lab, RelayProcess], way: str, family: int) -> None:
    lab, relay = stage
    client, server = ways(lab)[way]
    record = talk(relay, client, server.address(family))
    assert record["orig_dst"] == str(from_sockaddr((server.address(family), PORT)))
    assert record["outcome"] == "completed"
    borrows = any("preserve" in option for option in relay.options) and way != "local"
    assert (record["source"] != "relay") == borrows
    assert (str(record["upstream_local"]).strip("[").startswith(client.address(family))) == borrows or way == "local"


# --- beside a published port

DNAT_NFT = """\
table {ip} docker {{
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local tcp dport 8000 dnat to {there}
  }}
  chain output {{
    type nat hook output priority -100; policy accept;
    fib daddr type local tcp dport 8000 dnat to {there}
  }}
}}
"""


def publish(lab: Lab, program: str) -> None:
    """What container engines do: port 8000 of this host is 8001 of the server."""
    for family, there in ((4, f"{lab.server.ipv4}:{PUBLISHED}"), (6, f"[{lab.server.ipv6}]:{PUBLISHED}")):
        if program == "nft":
            lab.relay.run(["nft", "-f", "-"], input=DNAT_NFT.format(ip="ip" if family == 4 else "ip6", there=there))
            continue
        name = program if family == 4 else program.replace("iptables", "ip6tables")
        match = ["-p", "tcp", "-m", "addrtype", "--dst-type", "LOCAL", "--dport", str(PORT)]
        for chain in ("PREROUTING", "OUTPUT"):
            lab.relay.run([name, "-t", "nat", "-A", chain, *match, "-j", "DNAT", "--to-destination", there])


@pytest.mark.parametrize(
    ("backend", "mode", "others"),
    [
        ("nft", "tproxy", "nft"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("nft", "tproxy", "iptables-nft"),
                ("nft", "tproxy", "iptables-legacy"),
                ("iptables-nft", "tproxy", "iptables-nft"),
                ("iptables-legacy", "tproxy", "iptables-legacy"),
                ("nft", "redirect", "nft"),
                ("nft", "redirect", "iptables-nft"),
                ("iptables-nft", "redirect", "iptables-nft"),
                ("iptables-legacy", "redirect", "iptables-legacy"),
            )
        ),
    ],
)
def test_a_published_port(fresh_lab: Lab, backend: str, mode: str, others: str) -> None:
    lab = fresh_lab
    publish(lab, others)
    with contextlib.ExitStack() as stack:
        stack.callback(EchoServer(lab.server, PUBLISHED).close)

        def connected() -> list[socket.socket]:
            addresses = map(lab.relay.address, FAMILIES.values())
            return [stack.enter_context(lab.client.connect(address, PORT, 5)) for address in addresses]

        old = connected()
        assert not any(map(ping, old)), "the control: without a relay it works"
        options = ("--intercept-inbound", str(PORT), "--backend", backend, "--mode", mode)
        with lab.relay_process(*options) as relay:
            for family in FAMILIES.values():
                record = talk(relay, lab.client, lab.relay.address(family))
                assert record["orig_dst"] == str(
                    from_sockaddr((lab.relay.address(family), PORT))
                ), "as it was published"
                assert record["outcome"] == "completed"
                directly(lab.relay, lab.relay.address(family))
            assert not any(map(ping, old)), "what was there before goes on"
            carried = connected()
            assert not any(map(ping, carried))
            wait_until(lambda: opened(relay) == 4, "these are relayed too")
            relay.terminate()
            relay.wait_for_line(lambda line: line["message"] == "draining")
            assert not any(map(ping, [*old, *carried])), "while draining"
            for family in FAMILIES.values():
                directly(lab.client, lab.relay.address(family))
            for sock in carried:
                sock.close()
            assert relay.wait() == 0
            assert opened(relay) == 4, "nothing else was intercepted"
        assert not any(map(ping, old)), "after all"


# --- what is left alone


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_only_what_was_named_is_intercepted(lab: Lab, backend: str) -> None:
    """Ports beside the range, connections on lo, and another protocol on the same port."""
    ranges = ("--intercept-inbound", "8000-8010,9000", "--intercept-outbound", "8000")
    inside, outside = (8000, 8010, 9000), (7999, 8011, 8999, 9001)
    with contextlib.ExitStack() as stack:
        for port in (*inside, *outside):
            for host in (lab.server, lab.relay):
                stack.callback(EchoServer(host, port).close)
        relay = stack.enter_context(lab.relay_process(*ranges, "--backend", backend))
        for port in inside:
            assert talk(relay, lab.client, lab.server.ipv4, port)["orig_dst"] == f"{lab.server.ipv4}:{port}"
            assert talk(relay, lab.client, lab.relay.ipv6, port)["orig_dst"] == f"[{lab.relay.ipv6}]:{port}"
        for port in outside:
            directly(lab.client, lab.server.ipv6, port)
            directly(lab.client, lab.relay.ipv4, port)
            directly(lab.relay, lab.server.ipv4, port)
        directly(lab.relay, lab.server.ipv4, 9000)  # inbound only
        for address in ("127.0.0.1", "::1", lab.relay.ipv4, lab.relay.ipv6):
            directly(lab.relay, address)
        for family in FAMILIES.values():
            with lab.server.socket(family, socket.SOCK_DGRAM) as there, lab.client.socket(
                family, socket.SOCK_DGRAM
            ) as here:
                there.bind((lab.server.address(family), PORT))
                there.settimeout(5)
                here.sendto(b"datagram", (lab.server.address(family), PORT))
                assert there.recvfrom(100)[1][0] == lab.client.address(family)
        relay.stop()
        assert opened(relay) == 2 * len(inside)


OTHERS = """\
table inet other {
  chain early {
    type filter hook prerouting priority raw;
    tcp dport 8000 meta mark set mark or 0xf0004000
  }
  chain late {
    type filter hook input priority 0;
    iifname rc tcp dport 8000 meta mark & 0xf8ffffff != 0xf0004000 drop
  }
}
"""


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_bits_of_others_in_the_mark_stay(lab: Lab, backend: str) -> None:
    """Somebody marks early what he drops without his mark late; what is relayed has it from end to end."""
    lab.relay.run(["nft", "-f", "-"], input=OTHERS)
    try:
        with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--backend", backend) as relay:
            for way, (client, server) in ways(lab).items():
                for family in FAMILIES.values():
                    assert talk(relay, client, server.address(family))["outcome"] == "completed", way
            relay.stop()
    finally:
        lab.relay.run(["nft", "delete", "table", "inet", "other"])


@pytest.mark.slow
@pytest.mark.row("S3", "a direct connection from the network, listeners on loopback", "refused")
def test_nobody_can_dial_a_relay_on_loopback_and_anybody_else_can(lab: Lab, seen: Seen) -> None:
    """With the control: a relay on all addresses answers there, if only with a reset."""
    for bind, answer in (("127.0.0.1,::1", ConnectionRefusedError), ("0.0.0.0,::", None)):
        with lab.relay_process(*BOTH_WAYS, "--bind", bind) as relay:
            for family in FAMILIES.values():
                for port in (15002, 15006):
                    try:
                        lab.client.connect(lab.relay.address(family), port).close()
                        got: type[Exception] | None = None
                    except OSError as error:
                        got = type(error)
                    assert got is answer or (answer is None and got is ConnectionResetError), (bind, port)
            relay.stop()
    seen("refused")
