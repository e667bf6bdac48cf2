"""Paths that carry shorter packets than their ends: the routers tell whom the relay imitates, and the relay hears it.

Where routers say nothing at all, the kernel finds out by itself: tcp_mtu_probing, which etc/sysctl.d has.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import NoReturn

import pytest
from deadlines import PATIENCE
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, ways
from routers import Router, forget_paths, routers
from transfer_trials import Transfer, finish, transfer, transfer_servers

from tproxy_relay.lab import Lab, LabError, RelayProcess

AT_ONCE = 1.0
"""Seconds for a transfer whose sender is told at once: direct, it takes 0.01."""
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
        assert all(one.saw == "complete" for one in transfers(lab).values()), "before the routers are narrow"
        for router in pair:
            router.narrow()
        yield lab, pair


def transfers(lab: Lab) -> dict[str, Transfer]:
    """Both ways and by both families at once, one topology after the other: those share what a host learns."""
    seen: dict[str, Transfer] = {}
    for way, ends in ways(lab).items():
        forget_paths(lab)
        with ThreadPoolExecutor(4) as pool:
            jobs = {
                f"{way} {name} {direction}": pool.submit(transfer, *ends, family, direction, PATIENCE)
                for (name, family), direction in product(FAMILIES.items(), ("down", "up"))
            }
            seen |= {name: job.result() for name, job in jobs.items()}
    return seen


def check(lab: Lab, relay: RelayProcess) -> dict[str, Transfer]:
    """All of them are complete, and through the relay."""
    seen = transfers(lab)
    assert {name: one.saw for name, one in seen.items()} == dict.fromkeys(seen, "complete")
    for one in seen.values():
        record = relay.wait_for_record(lambda line, name=one.client: line["client"] == name)
        assert record["outcome"] == "completed"
    return seen


@pytest.mark.parametrize("backend, preserve", CELLS)
def test_a_narrow_path_is_heard_of(stage: Stage, backend: str, preserve: str) -> None:
    lab, _ = stage
    options = ("--backend", backend, "--preserve-source", preserve)
    with lab.relay_process(*BOTH_WAYS, *options) as relay:
        late = {name: one.seconds for name, one in check(lab, relay).items() if one.seconds > AT_ONCE}
        assert not late


@pytest.mark.parametrize("mode", [("tproxy", "address"), ("redirect", "no"), ("redirect", "address")], ids="-".join)
@pytest.mark.slow
def test_a_draining_relay_and_one_that_redirects_hear_of_it(stage: Stage, mode: tuple[str, str]) -> None:
    """Connections that live when the relay begins to drain have their narrow path ahead of them."""
    lab, _ = stage
    with lab.relay_process(*BOTH_WAYS, "--mode", mode[0], "--preserve-source", mode[1]) as relay:
        check(lab, relay)
        forget_paths(lab)
        begun = [
            (direction, source.connect(destination.address(family), PORT))
            for source, destination in ways(lab).values()
            for family, direction in product(FAMILIES.values(), ("down", "up"))
        ]
        relay.terminate()
        relay.wait_for_line(lambda line: line["message"] == "draining")
        with ThreadPoolExecutor(len(begun)) as pool:
            saw = [one.saw for one in pool.map(lambda one: finish(*one), begun)]
        assert saw == ["complete"] * len(begun)
        relay.wait_for_line(lambda line: line["message"] == "ruleset removed")
        assert len(relay.records()) == 2 * len(begun)


@pytest.mark.parametrize("backend, preserve", CELLS)
def test_a_path_that_nobody_speaks_of_is_found(stage: Stage, backend: str, preserve: str) -> None:
    lab, pair = stage
    with contextlib.ExitStack() as stack:
        for router in pair:
            router.keep_silent()
            stack.callback(router.keep_silent, False)
        for host in lab.hosts:
            # What goes to the relay is the ends' own matter, as it is without one.
            host.set_sysctl("net.ipv4.tcp_mtu_probing", 1)
            stack.callback(host.set_sysctl, "net.ipv4.tcp_mtu_probing", 0)
            # The kernel's own three attempts before it probes take it 6.5 seconds.
            host.set_sysctl("net.ipv4.tcp_retries1", 0)
            stack.callback(host.set_sysctl, "net.ipv4.tcp_retries1", 3)
        options = ("--backend", backend, "--preserve-source", preserve)
        check(lab, stack.enter_context(lab.relay_process(*BOTH_WAYS, *options)))
