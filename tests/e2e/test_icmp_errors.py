"""What routers and hosts say of packets of the relay comes to the relay, in whose name ever it has sent them.

A client of the relay is connected before the server is asked. So what a direct client is told by connect() is a reset
here, as it is for every server that cannot be reached (docs/relay.rst), and comes as soon.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NoReturn

import pytest
from deadlines import PATIENCE, wait_until
from interception import BACKENDS, FAMILIES, PORT, ways
from routers import Router, routers
from transfer_trials import transfer, transfer_servers
from unreachable_trials import PORTS, Answer, ask, refuse

from tproxy_relay.lab import Host, Lab, LabError

BOTH = tuple(f"--intercept-{way}={PORT}-{PORT + 20}" for way in ("inbound", "outbound"))
SOON = 4.0
"""Seconds. Who is told nothing waits for connect-timeout, ten seconds. Over cables as short as these the word comes
while connect() has the socket; the kernel forgets it then (LockDroppedIcmps), and sends the SYN again in a second."""
DIRECT = {
    "net": ("ENETUNREACH", "ENETUNREACH"),
    "host": ("EHOSTUNREACH", "EHOSTUNREACH"),
    "protocol": ("ENOPROTOOPT", "EACCES"),
    "port": ("ECONNREFUSED", "ECONNREFUSED"),
    "net prohibited": ("ENETUNREACH", "EACCES"),
    "host prohibited": ("EHOSTUNREACH", "EACCES"),
    "prohibited": ("EHOSTUNREACH", "EACCES"),
    "too many hops": ("EHOSTUNREACH", "EHOSTUNREACH"),
}
"""By IPv4 and by IPv6 (icmp(7), net/ipv6/icmp.c)."""
SILENT_NEIGHBOUR = {4: "10.81.2.99", 6: "fd81:2::99"}
CELLS = [
    pytest.param(*cell, marks=[] if cell == ("nft", "address") else pytest.mark.slow)
    for cell in product(BACKENDS, ("no", "address", "full"))
]

Stage = tuple[Lab, tuple[Router, Router]]


@pytest.fixture(scope="module")
def stage(require_or_skip: Callable[[str], NoReturn]) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab())
        except LabError as error:
            require_or_skip(str(error))
        pair = stack.enter_context(routers(lab))
        stack.enter_context(transfer_servers(lab.server, lab.relay))
        refuse(pair[1].host)
        for family in (4, 6):
            lab.relay.set_sysctl(f"net.ipv{family}.neigh.rs.retrans_time_ms", 50)
        # What the relay asks of a server on its own host, and nobody else.
        lab.relay.run(["nft", "-f", "-"], input=OWN_REFUSAL)
        yield lab, pair


OWN_REFUSAL = f"""\
table inet own {{
  chain input {{
    type filter hook input priority 0;
    iifname "lo" tcp dport {PORT + 20} reject with icmpx type port-unreachable
  }}
}}
"""


def answers(lab: Lab) -> dict[str, Answer]:
    """Of everybody who cannot be reached, from the client and from the relay's host."""
    asked: dict[str, tuple[Host, str, int]] = {}
    for (way, (source, server)), (version, family) in product(ways(lab).items(), FAMILIES.items()):
        if way == "host":
            asked[f"{way} {version} refused here"] = source, server.address(family), PORT + 20
            continue
        for name, port in PORTS.items():
            asked[f"{way} {version} {name}"] = source, server.address(family), port
        asked[f"{way} {version} neighbour"] = source, SILENT_NEIGHBOUR[int(version[1])], PORT
    with ThreadPoolExecutor(len(asked)) as pool:
        jobs = {name: pool.submit(ask, *one, PATIENCE) for name, one in asked.items()}
        return {name: job.result() for name, job in jobs.items()}


def test_what_is_said_directly(stage: Stage) -> None:
    lab, _ = stage
    for name, one in answers(lab).items():
        _, version, what = name.split(" ", 2)
        words = DIRECT.get(what, ("EHOSTUNREACH",) * 2)
        if what != "refused here":  # that is for what comes in from lo
            assert one.saw == words[version == "v6"] and one.seconds < SOON, name


@pytest.mark.parametrize("backend, preserve", CELLS)
def test_the_relay_is_told(stage: Stage, backend: str, preserve: str) -> None:
    lab, _ = stage
    with lab.relay_process(*BOTH, "--backend", backend, "--preserve-source", preserve) as relay:
        seen = answers(lab)
        assert {name: one.saw for name, one in seen.items() if "ECONNRESET" not in one.saw} == {}
        assert {name: one.seconds for name, one in seen.items() if one.seconds > SOON} == {}
        for name, one in seen.items():
            record = relay.wait_for_record(lambda line, name=one.client: line["client"] == name)
            refused = name.endswith((" port", "refused here"))
            assert record["outcome"] == ("connect-refused" if refused else "connect-unreachable"), name


LISTENERS = (15006, 15002)
STRANGERS = [
    *(("--backend", backend) for backend in BACKENDS),
    ("--bind", "127.0.0.1,::1"),
    ("--mode", "redirect", "--preserve-source", "address"),
]


@pytest.mark.parametrize("options", STRANGERS, ids=" ".join)
def test_strangers_whose_port_has_the_number_of_a_listener_are_told(stage: Stage, options: tuple[str, ...]) -> None:
    """They are not relayed. A look for the socket of what the error quotes finds the relay's listener."""
    lab, _ = stage
    asked = [(lab.server.address(family), PORTS["port"], PATIENCE) for family in FAMILIES.values()]

    def seen() -> list[str]:
        answers = [ask(lab.client, *one, port) for one, port in product(asked, (*LISTENERS, 15007))]
        return [one.saw if one.seconds < SOON else f"{one.saw} late" for one in answers]

    directly = seen()
    assert set(directly) == {"ECONNREFUSED"}
    with lab.relay_process(f"--intercept-inbound={PORT}", f"--intercept-outbound={PORT}", *options) as relay:
        for family in FAMILIES.values():
            client = transfer(lab.client, lab.server, family, "down", PATIENCE).client
            relay.wait_for_record(lambda line, name=client: line["client"] == name)
        assert seen() == directly


INTERRUPTION = """\
table inet interruption {{
  chain forward {{
    type filter hook forward priority 0;
    tcp flags & (syn | fin) == 0 tcp {side} {port} counter reject with icmpx type {kind}
  }}
}}
"""


@pytest.mark.parametrize("backend, preserve", CELLS)
def test_a_connection_lives_through_errors(stage: Stage, backend: str, preserve: str) -> None:
    """For one that is open they are hints (RFC 1122, 4.2.3.9): it tries again, and goes on when the way is free."""
    lab, pair = stage
    options = ("--backend", backend, "--preserve-source", preserve)
    with lab.relay_process(*BOTH, *options) as relay, ThreadPoolExecutor(4) as pool:
        for router, side, direction in ((pair[0].host, "sport", "down"), (pair[1].host, "dport", "up")):
            for kind in ("host-unreachable", "port-unreachable", "admin-prohibited"):
                text = INTERRUPTION.format(side=side, port=PORT, kind=kind)
                router.run(["nft", "-f", "-"], input=text)
                try:
                    jobs = [
                        pool.submit(transfer, lab.client, lab.server, family, direction, PATIENCE)
                        for family in FAMILIES.values()
                    ]
                    wait_until(lambda host=router: rejected(host) > 3, "packets are rejected")  # type: ignore[misc]
                finally:
                    router.run(["nft", "delete", "table", "inet", "interruption"])
                for job in jobs:
                    done = job.result()
                    assert done.saw == "complete", (direction, kind)
                    record = relay.wait_for_record(lambda line, name=done.client: line["client"] == name)
                    assert record["outcome"] == "completed"


def rejected(router: Host) -> int:
    words = router.run(["nft", "list", "table", "inet", "interruption"]).stdout.split()
    return int(words[words.index("packets") + 1])
