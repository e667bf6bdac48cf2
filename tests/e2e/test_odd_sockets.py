"""Sockets that are bound to a device, and an interface without an address: what the relay does about them, as
docs/interception.rst says."""

import contextlib
from collections.abc import Iterator

import odd_socket_trials
import pytest
from interception import BACKENDS, FAMILIES, PORT, EchoServer, attempt, ping

from tproxy_relay.lab import Lab

ANSWERED = "answered"
UNREACHED = ("TimeoutError", "No route to host")
"""The kernel says the latter after three SYNs, that is in three seconds or so."""


@pytest.fixture
def server(fresh_lab: Lab) -> Iterator[EchoServer]:
    made = EchoServer(fresh_lab.server)
    yield made
    made.close()


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_socket_bound_to_a_device_is_not_relayed(
    fresh_lab: Lab, server: EchoServer, backend: str, on_failure: str
) -> None:
    """What comes in by lo is not for it. So in mode tproxy it goes direct, as what it had connected before does, and
    redirect has nowhere to send it."""
    lab, outbound = fresh_lab, ("--intercept-outbound", str(PORT), "--backend", backend, "--on-failure", on_failure)
    for family in FAMILIES.values():
        assert odd_socket_trials.bound_to_device(lab, family) == ANSWERED
    with contextlib.ExitStack() as stack:
        older = [stack.enter_context(odd_socket_trials.connected(lab, family)) for family in FAMILIES.values()]
        relay = stack.enter_context(lab.relay_process(*outbound))
        for family in FAMILIES.values():
            assert attempt(lab.relay, lab.server, family) == ""
            assert odd_socket_trials.bound_to_device(lab, family) == ANSWERED
        assert [ping(sock) for sock in older] == ["", ""]
        relay.stop()
        assert len(relay.records()) == len(FAMILIES), "none of the bound ones"
    with lab.relay_process(*outbound, "--mode", "redirect") as relay:
        for family in FAMILIES.values():
            assert attempt(lab.relay, lab.server, family) == ""
            assert odd_socket_trials.bound_to_device(lab, family) in UNREACHED
        relay.stop()
        assert len(relay.records()) == len(FAMILIES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_redirect_on_an_interface_without_an_address_takes_a_bind_address(
    fresh_lab: Lab, server: EchoServer, backend: str
) -> None:
    """REDIRECT means the address of that interface (nf_nat_redirect.c), and drops the packet where there is none."""
    lab = fresh_lab
    odd_socket_trials.take_address(lab)
    redirect = ("--intercept-inbound", str(PORT), "--backend", backend, "--mode", "redirect")
    for family in FAMILIES.values():
        assert odd_socket_trials.by_interface_without_address(lab, family) == ANSWERED
    with lab.relay_process(*redirect) as relay:
        for family in FAMILIES.values():
            assert odd_socket_trials.by_interface_without_address(lab, family) in UNREACHED
        assert not relay.records()
    with lab.relay_process(*redirect, "--bind", "10.81.2.1,fd81:2::1") as relay:
        for family in FAMILIES.values():
            assert odd_socket_trials.by_interface_without_address(lab, family) == ANSWERED
        relay.stop()
        assert len(relay.records()) == len(FAMILIES)
    with lab.relay_process("--intercept-inbound", str(PORT), "--backend", backend) as relay:
        for family in FAMILIES.values():
            assert odd_socket_trials.by_interface_without_address(lab, family) == ANSWERED
        relay.stop()
        assert len(relay.records()) == len(FAMILIES)
