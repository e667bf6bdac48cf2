"""Other programs on the relay's host: `check` names who harms connections, and what it prints mends them and leaves the
other program its rule. That they are harmed, and mended, is shown by connections.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
from deadlines import PATIENCE, wait_until
from doctors import Doctor
from interception import BACKENDS, BOTH_WAYS, FAMILIES, PORT, EchoServer, opened
from neighbour_cases import BY_NFT, FIREWALLD, HARMLESS, by_iptables
from neighbour_trials import ANSWERED, LOST, RELAYED, SHORT, Neighbour, seen, spoil

from tproxy_relay.lab import Lab, RelayProcess

pytestmark = pytest.mark.slow

PROXY = 8001
TURNS = 4
"""A rule for each family has a finding for each."""


@contextlib.contextmanager
def servers(lab: Lab, ways: tuple[str, ...]) -> Iterator[None]:
    """Where clients connect to: one on the relay's host would tell the doctor that this is no gateway. And somebody
    else's proxy there."""
    there = [EchoServer(lab.relay if "host" in ways else lab.server), EchoServer(lab.relay, PROXY)]
    try:
        yield
    finally:
        for server in there:
            server.close()


def all_relayed(lab: Lab, relay: RelayProcess, ways: tuple[str, ...]) -> None:
    """Each connection is answered, and the relay has it."""
    before = opened(relay)
    assert {(way, family): seen(lab, way, family) for way in ways for family in FAMILIES} == {
        (way, family): RELAYED for way in ways for family in FAMILIES
    }
    wait_until(lambda: opened(relay) >= before + len(ways) * len(FAMILIES), "all are intercepted")


def found_and_mended(lab: Lab, doctor: Doctor, neighbour: Neighbour, *more: str) -> None:
    """It harms, is found, and is mended as printed; the neighbour's rule stays."""
    options = tuple(one for one in neighbour.options if one != str(PORT))
    intercept = BOTH_WAYS if "--intercept-inbound" not in options else ("--intercept-inbound", str(PORT))
    options = (*intercept, *(one for one in options if one != "--intercept-inbound"), *more)
    with servers(lab, neighbour.harms), lab.relay_process(*options) as relay:
        all_relayed(lab, relay, neighbour.harms)
        assert not doctor.check(*options).ills
        spoil(lab, neighbour.how)
        for way in neighbour.harms:
            for family in FAMILIES:
                assert seen(lab, way, family, SHORT if LOST in neighbour.sees else PATIENCE) in neighbour.sees
        for _ in range(TURNS):
            ills = doctor.check(*options).ills
            assert {(one["name"], one["level"]) for one in ills} <= {(neighbour.finding, neighbour.level)}
            if not ills:
                break
            assert all(one["what"] and one["why"] for one in ills)
            doctor.shell(ills[0]["remedy"])
        else:
            pytest.fail(f"not mended: {ills}")
        all_relayed(lab, relay, neighbour.harms)
        doctor.shell(neighbour.keeps or "true")


def name_of(value: object) -> str:
    return getattr(value, "name", "") or str(value)


@pytest.mark.parametrize("neighbour", BY_NFT, ids=name_of)
def test_what_others_do_by_nft_is_found_and_mended(fresh_lab: Lab, doctor: Doctor, neighbour: Neighbour) -> None:
    found_and_mended(fresh_lab, doctor, neighbour)


@pytest.mark.parametrize(
    ("number", "program", "backend"),
    [
        pytest.param(number, program, backend, id=f"{neighbour.name}, {program} beside {backend}")
        for number, neighbour in enumerate(by_iptables(""))
        for program in BACKENDS[1:]
        for backend in BACKENDS
        if number or program != backend
    ],
)
def test_what_others_do_by_iptables_is_found_and_mended(
    fresh_lab: Lab, doctor: Doctor, number: int, program: str, backend: str
) -> None:
    neighbour = by_iptables(program)[number]
    if neighbour.by_order and backend != "nft":
        neighbour = replace(neighbour, level="warning")
    found_and_mended(fresh_lab, doctor, neighbour, "--backend", backend)


@pytest.mark.parametrize("program", BACKENDS[1:])
def test_marks_restored_behind_the_relays_rules_of_the_same_program_do_no_harm(
    fresh_lab: Lab, doctor: Doctor, program: str
) -> None:
    options = (*BOTH_WAYS, "--backend", program)
    with servers(fresh_lab, ("gateway",)), fresh_lab.relay_process(*options) as relay:
        spoil(fresh_lab, by_iptables(program)[0].how)
        all_relayed(fresh_lab, relay, ("gateway", "local"))
        assert not doctor.check(*options).ills


@pytest.mark.parametrize("backend", BACKENDS)
def test_usual_neighbours_are_nobodys_harm(fresh_lab: Lab, doctor: Doctor, backend: str) -> None:
    spoil(fresh_lab, HARMLESS)
    options = (*BOTH_WAYS, "--backend", backend)
    with servers(fresh_lab, ("gateway",)), fresh_lab.relay_process(*options) as relay:
        all_relayed(fresh_lab, relay, ("gateway", "local"))
        assert doctor.check(*options).ills == []


def test_a_reverse_path_filter_is_fine_where_nothing_outbound_is_intercepted(fresh_lab: Lab, doctor: Doctor) -> None:
    spoil(fresh_lab, (FIREWALLD,))
    inbound = ("--intercept-inbound", str(PORT))
    with servers(fresh_lab, ("gateway",)), fresh_lab.relay_process(*inbound) as relay:
        all_relayed(fresh_lab, relay, ("gateway",))
        assert doctor.check(*inbound).ills == []


UNNUMBERED = (
    "ip addr flush dev rc scope global",
    "ip addr add 10.81.1.1/32 dev rs",
    "ip route add 10.81.1.0/24 dev rc src 10.81.1.1",
)


def test_redirect_on_an_interface_without_an_address_is_told_and_mended(fresh_lab: Lab, doctor: Doctor) -> None:
    spoil(fresh_lab, UNNUMBERED)
    options = ("--intercept-inbound", str(PORT), "--bind", "0.0.0.0")
    with servers(fresh_lab, ("gateway",)):
        assert seen(fresh_lab, "gateway", "v4") == ANSWERED, "without a relay"
        with fresh_lab.relay_process(*options, "--mode", "redirect"):
            assert seen(fresh_lab, "gateway", "v4", SHORT) == LOST
            (found,) = doctor.check(*options, "--mode", "redirect").ills
        assert found["name"] == "redirect-ipv4" and "rc" in found["what"]
        said = doctor.shell(found["remedy"])
        assert "problem:" not in said
        with fresh_lab.relay_process(*options, "--mode", "tproxy"):
            assert seen(fresh_lab, "gateway", "v4") == RELAYED
