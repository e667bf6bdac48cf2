"""Handshakes that only the listener can end: with SYN cookies the client's ACK has no socket that rules could find.

All namespaces of one kernel share the secret of the cookies. The server's host makes none, or it would take those of
the relay.
"""

import contextlib
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import product

import pytest
from admin_views import program, sessions
from deadlines import wait_until
from half_open import cookies, half_open, lead_to_nobody, served
from interception import BACKENDS, FAMILIES, PORT, EchoServer, attempt, echo_servers, opened, ping, ways

from tproxy_relay.lab import Host, Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

SILENT = """\
table inet silent {
  chain input {
    type filter hook input priority 0;
    tcp flags & (syn | ack) == ack drop
  }
}
"""
PROGRAMS = ("iptables", "ip6tables")
INBOUND = ("--intercept-inbound", str(PORT))
COOKIES = "net.ipv4.tcp_syncookies"
FLOOD = 6_000
"""SYNs: more than the 4,096 half-open connections of a listener."""
CELLS = [
    pytest.param(*cell, marks=[] if cell == ("nft", "full") else pytest.mark.slow)
    for cell in product(BACKENDS, ("no", "address", "full"))
]
EVERY_BACKEND = [pytest.param(name, marks=[] if name == "nft" else pytest.mark.slow) for name in BACKENDS]


@pytest.fixture
def servers(lab: Lab) -> Iterator[dict[str, EchoServer]]:
    lab.server.set_sysctl(COOKIES, 0)
    lab.relay.set_sysctl(COOKIES, 2)
    with echo_servers(lab) as both:
        yield both


def all_served(lab: Lab, relay: RelayProcess, clients: int = 10) -> None:
    """Through the relay, by cookies."""
    sent, returned = cookies(lab.relay)
    before = opened(relay)
    for (way, ends), (name, family) in product(inbound(lab).items(), FAMILIES.items()):
        assert Counter(served(*ends, family, clients)) == {"served": clients}, f"{way} {name}"
    wait_until(lambda: opened(relay) == before + 4 * clients, "they are intercepted")
    now = cookies(lab.relay)
    assert now[0] - sent >= 4 * clients and now[1] - returned >= 4 * clients


def inbound(lab: Lab) -> dict[str, tuple[Host, Host]]:
    return {way: ends for way, ends in ways(lab).items() if way != "local"}


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("backend, preserve", CELLS)
def test_clients_that_bring_a_cookie_are_served(lab: Lab, backend: str, preserve: str) -> None:
    with lab.relay_process(*INBOUND, "--backend", backend, "--preserve-source", preserve) as relay:
        all_served(lab, relay)
        wait_until(lambda: len(relay.records()) == 40, "all have ended")
        assert Counter(record["outcome"] for record in relay.records()) == {"completed": 40}


@pytest.mark.slow
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("options", [("--bind", "127.0.0.1,::1"), ("--on-failure", "closed"), ("--mode", "redirect")])
def test_with_other_settings_too(lab: Lab, options: tuple[str, ...]) -> None:
    if options[0] == "--bind":
        options += ("--backend", "iptables-legacy")
    with lab.relay_process(*INBOUND, "--intercept-outbound", str(PORT), *options) as relay:
        all_served(lab, relay)
        for family in FAMILIES.values():
            assert served(lab.relay, lab.server, family, 2) == ["served"] * 2, "outbound"


@pytest.mark.parametrize("backend", ["none", *EVERY_BACKEND])
def test_a_flood_of_half_open_connections_ends_no_service(fresh_lab: Lab, backend: str) -> None:
    """By each family, and as it is without a relay, with a server of the same backlog."""
    lab = fresh_lab
    lead_to_nobody(lab)
    with contextlib.closing(EchoServer(lab.server, backlog=4096)):
        if backend == "none":
            assert flooded(lab, lab.server) == {"v4 served": 10, "v6 served": 10}
            return
        lab.server.set_sysctl(COOKIES, 0)
        with lab.relay_process(*INBOUND, "--backend", backend) as relay:
            assert flooded(lab, lab.relay) == {"v4 served": 10, "v6 served": 10}
            wait_until(lambda: opened(relay) == 20, "they are intercepted")


def flooded(lab: Lab, who: Host) -> dict[str, int]:
    """What ten clients of each family see in a flood of it; `who` makes the cookies."""
    sent, saw = cookies(who)[0], Counter[str]()
    for name, family in FAMILIES.items():
        half_open(lab, lab.server.address(family), FLOOD)
        saw.update(f"{name} {one}" for one in served(lab.client, lab.server, family))
    assert cookies(who)[0] - sent > 2 * 1_000, "the flood fills the backlog"
    return dict(saw)


# --- the life of what was answered

DEAF = """\
table inet deaf {{
  chain input {{
    type filter hook input priority 0;
    tcp flags & ({flags}) == ({flags}) drop
  }}
}}
"""


@contextlib.contextmanager
def deaf(client: Host, flags: str) -> Iterator[None]:
    """The client does not get packets with these flags."""
    client.run(["nft", "-f", "-"], input=DEAF.format(flags=flags))
    try:
        yield
    finally:
        client.run(["nft", "delete", "table", "inet", "deaf"])


def connected(lab: Lab) -> list[socket.socket]:
    return [
        source.connect(destination.address(family), PORT)
        for (source, destination), family in product(inbound(lab).values(), FAMILIES.values())
    ]


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_they_live_while_the_relay_drains_and_others_go_direct(lab: Lab, backend: str) -> None:
    with contextlib.ExitStack() as stack:
        old = [stack.enter_context(sock) for sock in connected(lab)]
        relay = stack.enter_context(lab.relay_process(*INBOUND, "--backend", backend))
        assert not any(map(ping, old)), "what was there before"
        ours = [stack.enter_context(sock) for sock in connected(lab)]
        assert not any(map(ping, ours))
        wait_until(lambda: opened(relay) == 4, "they are intercepted")
        relay.terminate()
        relay.wait_for_line(lambda line: line["message"] == "draining")
        direct = [stack.enter_context(sock) for sock in connected(lab)]
        assert not any(map(ping, [*old, *ours, *direct])), "while it drains"
        for sock in ours:
            sock.close()
        relay.wait_for_line(lambda line: line["message"] == "ruleset removed")
        assert opened(relay) == 4
        assert {record["outcome"] for record in relay.records()} == {"completed"}
        with lab.relay_process(*INBOUND, "--backend", backend) as next_one:
            assert not any(map(ping, [*old, *direct])), "with the next relay"
            assert opened(next_one) == 0


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_while_the_relay_drains_whose_socket_is_gone_is_reset(lab: Lab, backend: str, on_failure: str) -> None:
    """It did not hear of the end. Nobody listens for it any more, and the server knows nothing of it. (Without cookies:
    the acknowledgement of an echo proves as much as the first one does, and the server here would take it for that.)"""
    options = (*INBOUND, "--backend", backend, "--on-failure", on_failure)
    for host in (lab.server, lab.relay):
        host.set_sysctl(COOKIES, 0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(echo_servers(lab))
        relay = stack.enter_context(lab.relay_process(*options))
        lost, others = ([stack.enter_context(sock) for sock in connected(lab)] for _ in range(2))
        assert not any(map(ping, [*lost, *others]))
        names = [str(from_sockaddr(sock.getsockname())) for sock in lost]
        with deaf(lab.client, "rst"):
            for one in sessions(lab):
                if one["client"] in names:
                    program(lab, "sessions", "--abort", one["id"])
            assert [relay.record_of(sock)["outcome"] for sock in lost] == ["aborted"] * 4
        relay.terminate()
        relay.wait_for_line(lambda line: line["message"] == "ruleset draining")
        wait_until(lambda: "15006" not in lab.relay.run(["ss", "-Htln"]).stdout, "nobody listens")
        seen = [ping(sock) for sock in lost]
        assert ["ConnectionResetError" in one for one in seen] == [True] * 4, seen
        assert not any(map(ping, others))
        for sock in others:
            sock.close()
        relay.wait_for_line(lambda line: line["message"] == "ruleset removed")


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_who_did_not_hear_the_answer_and_went_direct_is_left_alone(
    lab: Lab, servers: dict[str, EchoServer], backend: str
) -> None:
    """Its SYN comes again while the relay drains; in conntrack it is the same connection."""
    with contextlib.ExitStack() as stack:
        with lab.relay_process(*INBOUND, "--backend", backend) as relay:
            other = stack.enter_context(lab.client.connect(lab.server.ipv4, PORT))
            assert ping(other) == ""
            client = stack.enter_context(lab.client.socket())
            client.setblocking(False)
            with deaf(lab.client, "syn | ack"):
                before = cookies(lab.relay)[0]
                client.connect_ex((lab.server.ipv4, PORT))
                wait_until(lambda: cookies(lab.relay)[0] > before, "it is answered")
                relay.terminate()
                wait_until(lambda: "15006" not in lab.relay.run(["ss", "-Htln"]).stdout, "nobody listens")
            wait_until(lambda: not client.connect_ex((lab.server.ipv4, PORT)), "the SYN is sent again")
            assert ping(client) == "" and servers["server"].peers[-1] == lab.client.ipv4
            other.close()
            relay.wait_for_line(lambda line: line["message"] == "ruleset removed")
            assert opened(relay) == 1
        with lab.relay_process(*INBOUND, "--backend", backend):
            assert ping(client) == "", "with the next relay"


@pytest.mark.slow
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("backend", BACKENDS)
def test_under_closed_what_a_dead_relay_has_answered_is_reset(fresh_lab: Lab, backend: str) -> None:
    """It did not hear of the death, and the server would not say either that it knows nothing of it."""
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process(*INBOUND, "--backend", backend, "--on-failure", "closed") as relay:
        clients = [lab.client.connect(lab.server.address(family), PORT) for family in FAMILIES.values()]
        assert not any(map(ping, clients))
        wait_until(lambda: opened(relay) == 2, "they are intercepted")
        lab.server.run(["nft", "-f", "-"], input=SILENT)
        with deaf(lab.client, "rst"):
            relay.kill()
            wait_until(lambda: attempt(lab.client, lab.server, socket.AF_INET6) != "", "it is dead")
            if backend != "nft":
                saves = [f"{program}{backend.removeprefix('iptables')}-save" for program in PROGRAMS]
                wait_until(lambda: all("CLOSED_IN" in lab.relay.run([one]).stdout for one in saves), "closed")
        for client in clients:
            assert "ConnectionResetError" in ping(client)
            client.close()


@pytest.mark.slow
@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_relay_that_takes_over_serves_them(lab: Lab, backend: str) -> None:
    options = (*INBOUND, "--backend", backend)
    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(lab.relay_process(*options))
        ours = [stack.enter_context(sock) for sock in connected(lab)]
        assert not any(map(ping, ours))
        with lab.relay_process(*options, "--take-over") as next_one:
            all_served(lab, next_one, 3)
            assert not any(map(ping, ours)), "the former one finishes what it has"
            assert opened(relay) == 4
            for sock in ours:
                sock.close()
            assert relay.wait() == 0
            all_served(lab, next_one, 3)


NOTRACK = f"""\
table inet untracked {{
  chain prerouting {{ type filter hook prerouting priority raw; tcp dport {PORT} notrack; }}
  chain output {{ type filter hook output priority raw; tcp sport {PORT} notrack; }}
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_where_nothing_is_tracked_there_is_no_way_to_know_them(fresh_lab: Lab, backend: str) -> None:
    """Handshakes without cookies are no worse for it (docs/interception.rst)."""
    lab = fresh_lab
    lab.relay.run(["nft", "-f", "-"], input=NOTRACK.replace("; }", "\n}").replace("{ type", "{\ntype"))
    lab.server.set_sysctl(COOKIES, 0)
    with echo_servers(lab), lab.relay_process(*INBOUND, "--backend", backend) as relay:
        for family in FAMILIES.values():
            assert served(lab.client, lab.server, family) == ["served"] * 10
        wait_until(lambda: opened(relay) == 20, "they are intercepted")
        lab.relay.set_sysctl(COOKIES, 2)
        assert served(lab.client, lab.server, socket.AF_INET, 2) == ["ConnectionResetError"] * 2
