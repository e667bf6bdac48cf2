"""Somebody empties the table of connections (`conntrack -F`) under a relay: what is direct lives on, and so does what
is relayed, except in mode redirect and where a program on the relay's host is the first to send."""

import shutil
import socket
from collections.abc import Callable, Iterator
from typing import NoReturn

import flush_trials
import pytest
from flush_trials import LIVES, LOST
from interception import BACKENDS, BOTH_WAYS, FAMILIES

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net import sockets
from tproxy_relay.net.endpoint import from_sockaddr

TOPOLOGIES = ("gateway", "host", "local")
SENDERS = ("client", "server")
TRIES = 2
"""Connections of a kind. One may send a packet again because another program has the processor, but not each."""


@pytest.fixture
def tool(require_or_skip: Callable[[str], NoReturn]) -> None:
    if shutil.which("conntrack", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/bin") is None:
        require_or_skip("conntrack is not installed")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def outcomes(lab: Lab, relay: RelayProcess | None = None) -> dict[str, str]:
    """What becomes of a connection of each kind, by its topology, its family and who speaks first."""
    saw = {}
    for topology in TOPOLOGIES:
        for name, family in FAMILIES.items():
            for first in SENDERS:
                ends = flush_trials.live_connection(lab, topology, family)
                if relay is not None:
                    client = str(from_sockaddr(ends[0].getsockname()))
                    relay.wait_for_line(
                        lambda line, c=client: line["message"] == "connection open" and line["client"] == c
                    )
                saw[f"{topology} {name} {first}"] = flush_trials.after_flush(lab, ends, first)
                flush_trials.close(ends)
    return saw


def expected(preserve: str) -> dict[str, str]:
    """A program here that speaks first sends past the relay: to the server whom it asked for, or, where it is a server
    whose client the relay imitates, to that client. Both know nothing of such a connection, and reset it."""
    lost = {("local", "client"), *([("host", "server")] if preserve != "no" else [])}
    return {
        f"{topology} {family} {first}": LOST if (topology, first) in lost else LIVES
        for topology in TOPOLOGIES
        for family in FAMILIES
        for first in SENDERS
    }


@pytest.mark.parametrize("preserve", ["no", "address", "full"])
@pytest.mark.usefixtures("tool")
def test_relayed_connections_live_on_but_for_programs_here_that_speak_first(
    fresh_lab: Lab, backend: str, preserve: str
) -> None:
    options = (*BOTH_WAYS, "--backend", backend, "--preserve-source", preserve)
    with fresh_lab.relay_process(*options) as relay:
        assert outcomes(fresh_lab, relay) == expected(preserve)


@pytest.mark.usefixtures("tool")
def test_it_is_so_with_servers_whose_answers_have_the_relays_mark(fresh_lab: Lab, backend: str) -> None:
    """They have it from the packets of the relay: tcp(7), tcp_fwmark_accept."""
    fresh_lab.relay.set_sysctl("net.ipv4.tcp_fwmark_accept", 1)
    with fresh_lab.relay_process(*BOTH_WAYS, "--backend", backend, "--preserve-source", "address") as relay:
        assert outcomes(fresh_lab, relay) == expected("address")


@pytest.mark.usefixtures("tool")
def test_it_is_so_while_the_relay_drains(fresh_lab: Lab, backend: str) -> None:
    with fresh_lab.relay_process(*BOTH_WAYS, "--backend", backend, "--preserve-source", "address") as relay:
        made = [
            (first, flush_trials.live_connection(fresh_lab, topology, family))
            for topology, first in (("host", "client"), ("local", "server"))
            for family in FAMILIES.values()
        ]
        relay.terminate()
        relay.wait_for_line(lambda line: line["message"] == "draining")
        for first, ends in made:
            assert flush_trials.after_flush(fresh_lab, ends, first) == LIVES
            flush_trials.close(ends)
        assert relay.wait() == 0
        assert len(relay.records()) == len(made)


def masquerade(lab: Lab) -> None:
    """What the relay's host sends to the server gets another source address there."""
    for program, address, prefix in (("iptables-nft", "10.81.2.77", 24), ("ip6tables-nft", "fd81:2::77", 64)):
        more = ["nodad", "preferred_lft", "0"] if prefix == 64 else []
        lab.relay.run(["ip", "addr", "add", f"{address}/{prefix}", "dev", "rs", *more])
        rule = ["-t", "nat", "-A", "POSTROUTING", "-o", "rs", "-p", "tcp", "-j", "SNAT", "--to-source", address]
        lab.relay.run([program, *rule])


@pytest.mark.parametrize("translated", [False, True])
@pytest.mark.usefixtures("tool")
def test_connections_older_than_the_relay_live_on_untouched(fresh_lab: Lab, backend: str, translated: bool) -> None:
    """Conntrack does not know them any better, or begins to track with our rules; the relay does not have them."""
    if translated:
        masquerade(fresh_lab)
    # What is translated is known to conntrack alone: without a relay, too, nobody else may speak first.
    kinds = [
        (topology, family, first)
        for topology in TOPOLOGIES
        for family in FAMILIES
        for first in (SENDERS[:1] if translated else SENDERS)
    ] * TRIES
    made = [(one, flush_trials.live_connection(fresh_lab, one[0], FAMILIES[one[1]])) for one in kinds]
    with fresh_lab.relay_process(*BOTH_WAYS, "--backend", backend, "--preserve-source", "address") as relay:
        for _, ends in made:
            # The server last: no answer of it may be under way when the table is emptied.
            assert [flush_trials.exchange(*ends), flush_trials.exchange(*ends[::-1])] == [LIVES, LIVES]
        for _ in range(2):
            for (_, _, first), ends in made:
                assert flush_trials.after_flush(fresh_lab, ends, first) == LIVES
        again = [one for one, ends in made if any(sockets.tcp_info(end).retransmits for end in ends)]
        assert [one for one in set(again) if again.count(one) == TRIES] == [], "a packet was lost"
        for _, ends in made:
            flush_trials.close(ends)
        assert not relay.records()


@pytest.mark.usefixtures("tool")
def test_direct_connections_live_on(fresh_lab: Lab) -> None:
    assert set(outcomes(fresh_lab).values()) == {LIVES}


@pytest.mark.usefixtures("tool")
def test_in_mode_redirect_they_are_lost(fresh_lab: Lab) -> None:
    """The addresses are rewritten by the table that is gone. docs/interception.rst says so."""
    with fresh_lab.relay_process(*BOTH_WAYS, "--mode", "redirect") as relay:
        ends = flush_trials.live_connection(fresh_lab, "gateway", socket.AF_INET)
        client = str(from_sockaddr(ends[0].getsockname()))
        relay.wait_for_line(lambda line: line["message"] == "connection open" and line["client"] == client)
        assert flush_trials.after_flush(fresh_lab, ends, "client") != LIVES
        flush_trials.close(ends)
