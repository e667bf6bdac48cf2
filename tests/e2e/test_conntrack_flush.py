"""Somebody empties the table of connections (`conntrack -F`) under a relay: what is direct lives on, and so does what
is relayed, except in mode redirect."""

import shutil
import socket
from collections.abc import Callable, Iterator
from typing import NoReturn

import flush_trials
import pytest
from flush_trials import LIVES
from interception import BACKENDS, BOTH_WAYS, FAMILIES

from tproxy_relay.lab import Lab, RelayProcess
from tproxy_relay.net.endpoint import from_sockaddr

TOPOLOGIES = ("gateway", "host", "local")
SENDERS = ("client", "server")


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


@pytest.mark.parametrize("preserve", ["no", "address", "full"])
@pytest.mark.usefixtures("tool")
def test_relayed_connections_live_on(fresh_lab: Lab, backend: str, preserve: str) -> None:
    options = (*BOTH_WAYS, "--backend", backend, "--preserve-source", preserve)
    with fresh_lab.relay_process(*options) as relay:
        saw = outcomes(fresh_lab, relay)
        assert {kind: what for kind, what in saw.items() if what != LIVES} == {}


@pytest.mark.usefixtures("tool")
def test_it_is_so_while_the_relay_drains(fresh_lab: Lab, backend: str) -> None:
    with fresh_lab.relay_process(*BOTH_WAYS, "--backend", backend, "--preserve-source", "address") as relay:
        made = [
            flush_trials.live_connection(fresh_lab, topology, family)
            for topology in ("host", "local")
            for family in FAMILIES.values()
        ]
        relay.terminate()
        relay.wait_for_line(lambda line: line["message"] == "draining")
        for ends, first in zip(made, SENDERS * 2):
            assert flush_trials.after_flush(fresh_lab, ends, first) == LIVES
            flush_trials.close(ends)
        assert relay.wait() == 0
        assert len(relay.records()) == len(made)


@pytest.mark.usefixtures("tool")
def test_connections_older_than_the_relay_live_on(fresh_lab: Lab, backend: str) -> None:
    """Conntrack does not know them any better, and the relay does not have them."""
    made = [
        (first, flush_trials.live_connection(fresh_lab, topology, family))
        for topology in TOPOLOGIES
        for family in FAMILIES.values()
        for first in SENDERS
    ]
    with fresh_lab.relay_process(*BOTH_WAYS, "--backend", backend, "--preserve-source", "address") as relay:
        for first, ends in made:
            assert flush_trials.after_flush(fresh_lab, ends, first) == LIVES
        for first, ends in made:
            assert flush_trials.after_flush(fresh_lab, ends, first) == LIVES, "once more"
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
