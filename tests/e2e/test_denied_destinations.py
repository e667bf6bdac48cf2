"""Destinations that no connection may have, asked for by real packets: each is reset, and recorded as denied.

What a kernel never lets arrive is judged in tests/unit only: multicast and broadcast, which TCP does not connect to;
mapped addresses, which go over the wire as IPv4; and fe80::/10, which is not steered, for its route must be of the same
interface (rt6_need_strict).
"""

import socket
from typing import Any

import pytest
from exchanges import see_reset
from interception import FAMILIES, PORT, echo_servers, ping
from rows import Seen

from tproxy_relay.lab import Lab
from tproxy_relay.net.endpoint import Endpoint

THROUGH = {
    "169.254.169.254": "169.254.0.0/16",
    "240.0.0.1": "240.0.0.0/4",
    "fd00:ec2::254": "fd00:ec2::254/128",
    "fec0::1": "fec0::/10",
    "64:ff9b::7f00:1": "127.0.0.0/8",
    "64:ff9b::a9fe:a9fe": "169.254.0.0/16",
    "64:ff9b:1::7f00:1": "127.0.0.0/8",
    "2002:7f00:1::1": "127.0.0.0/8",
    "2002:a9fe:a9fe::1": "169.254.0.0/16",
    "2001:0:7f00:1::1": "127.0.0.0/8",
    "::ffff:0:127.0.0.1": "127.0.0.0/8",
    "::127.0.0.1": "127.0.0.0/8",
    "2001:db8::5efe:169.254.169.254": "169.254.0.0/16",
}
"""Through the relay's host, from a client that has a route there; and the network that denies each."""

NAIVE = f"""
table inet naive {{
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        tcp dport {PORT} meta nfproto ipv4 meta mark set 0x1 tproxy ip to :15006 accept
        tcp dport {PORT} meta nfproto ipv6 meta mark set 0x1 tproxy ip6 to :15006 accept
    }}
}}
"""
"""Somebody's own rules. Those of the relay never intercept 169.254.0.0/16 and fe80::/10 in the first place."""

WITHIN = {
    "127.0.0.1": "127.0.0.0/8",
    "0.0.0.0": "127.0.0.0/8",
    "127.8.9.1": "127.0.0.0/8",
    "::1": "::1/128",
    "::": "::1/128",
}
"""On the relay's own host, whose nat rules send them to the relay."""


def served(client: socket.socket) -> bool:
    """An echo, and a clean end."""
    answer = ping(client)
    client.shutdown(socket.SHUT_WR)
    return (answer, client.recv(1)) == ("", b"")


REDIRECT_LO = f"""
table inet redirect_lo {{
    chain output {{
        type nat hook output priority -100; policy accept;
        meta mark & 0x07000000 == 0x04000000 return
        oifname "lo" tcp dport {PORT} redirect to :15002
    }}
}}
"""


def steer_naively(lab: Lab) -> None:
    """As somebody's own script does it."""
    for network in ("169.254.0.0/16", "240.0.0.0/4"):
        lab.client.run(["ip", "-4", "route", "add", network, "via", lab.relay.ipv4])
    lab.relay.run(["nft", "-f", "-"], input=NAIVE)
    for family in ("-4", "-6"):
        lab.relay.run(["ip", family, "rule", "add", "fwmark", "1", "lookup", "100"])
        lab.relay.run(["ip", family, "route", "add", "local", "default", "dev", "lo", "table", "100"])


@pytest.mark.row("S7", "special addresses in every disguise, through real interception", "reset, outcome denied")
def test_special_addresses_are_denied(fresh_lab: Lab, seen: Seen) -> None:
    steer_naively(fresh_lab)
    with fresh_lab.relay_process() as relay:
        for host, network in THROUGH.items():
            with see_reset(fresh_lab.client, host, PORT)[0] as client:
                check_denied(relay.record_of(client), host, network)
        relay.stop()
    seen(f"{len(THROUGH)} of {len(THROUGH)} reset and denied")


def check_denied(record: dict[str, Any], host: str, network: str) -> None:
    assert (record["outcome"], record["orig_dst"]) == ("denied", canonical(host))
    assert network in record["error"]
    assert "upstream_local" not in record


def canonical(host: str) -> str:
    """As the kernel writes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return str(Endpoint(socket.inet_ntop(family, socket.inet_pton(family, host)), PORT))


@pytest.mark.row("S7", "loopback addresses, redirected on the relay's own host", "reset, outcome denied")
def test_loopback_is_denied(lab: Lab, seen: Seen) -> None:
    lab.relay.run(["nft", "-f", "-"], input=REDIRECT_LO)
    try:
        with lab.relay_process("--mode", "redirect") as relay:
            for host, network in WITHIN.items():
                with see_reset(lab.relay, host, PORT)[0] as client:
                    record = relay.record_of(client)
                assert record["outcome"] == "denied", host
                assert network in record["error"]
    finally:
        lab.relay.run(["nft", "delete", "table", "inet", "redirect_lo"])
    seen(f"{len(WITHIN)} of {len(WITHIN)} reset and denied")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.row("S8", "relayed to a service of the relay's own host", "denied unless allowed explicitly")
def test_the_relays_own_services_are_denied_unless_they_are_named(lab: Lab, family: int, seen: Seen) -> None:
    """By somebody else's rules they are steered to a relay that was not told so."""
    address = lab.relay.address(family)
    named = f"[{address}]:{PORT}" if family == socket.AF_INET6 else f"{address}:{PORT}"
    lab.intercept((PORT,))
    try:
        with echo_servers(lab):
            with lab.relay_process() as relay, see_reset(lab.client, address, PORT)[0] as client:
                record = relay.record_of(client)
                assert record["outcome"] == "denied"
                assert "is an address of this host" in record["error"]
            with lab.relay_process("--allow", named) as relay:
                with lab.client.connect(address, PORT) as client:
                    assert served(client)
                    assert relay.record_of(client)["outcome"] == "completed"
    finally:
        lab.stop_intercepting()
    seen("denied; served when allow names it")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_own_addresses_are_known_where_every_address_can_be_bound(fresh_lab: Lab, family: int) -> None:
    lab = fresh_lab
    for name in ("net.ipv4.ip_nonlocal_bind", "net.ipv6.ip_nonlocal_bind"):
        lab.relay.set_sysctl(name, 1)
    lab.intercept((PORT,))
    with echo_servers(lab), lab.relay_process() as relay:
        for host, outcome in ((lab.server, "completed"), (lab.relay, "denied")):
            if outcome == "completed":
                client = lab.client.connect(host.address(family), PORT)
                assert served(client)
            else:
                client = see_reset(lab.client, host.address(family), PORT)[0]
            with client:
                assert relay.record_of(client)["outcome"] == outcome


def test_what_the_operator_denies_and_allows(lab: Lab) -> None:
    server = lab.server.ipv4
    options = ("--deny", "0.0.0.0/0,::/0", "--allow", f"{server}:{PORT}")
    with echo_servers(lab), lab.relay_process("--intercept-inbound", f"{PORT}-{PORT + 1}", *options) as relay:
        with lab.client.connect(server, PORT) as client:
            assert served(client)
            assert relay.record_of(client)["outcome"] == "completed"
        for host, port in ((server, PORT + 1), (lab.server.ipv6, PORT), (lab.relay.ipv4, PORT)):
            with see_reset(lab.client, host, port)[0] as client:
                record = relay.record_of(client)
            assert record["outcome"] == "denied", (host, port)
            assert "deny = " in record["error"]
