"""What is in the kernel against what should be, in words; damage is seen and mended, for each backend."""

from collections.abc import Callable
from typing import NoReturn

import networks
import pytest
from plans import PLAN, VARIANTS, quickly

from tproxy_relay.intercept import backend, backends, programs
from tproxy_relay.intercept.backend import Backend
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.iptables_save import PREFIX

WANTED = {"inet a": ["one", "two"], "inet b": ["three"]}


@pytest.mark.parametrize(
    "there, sentences",
    [
        (WANTED, []),
        ({}, ["inet a: missing", "inet b: missing"]),
        ({**WANTED, "inet c": []}, ["inet c: not in the plan"]),
        ({**WANTED, "inet b": []}, ["inet b: 'three' is missing"]),
        ({**WANTED, "inet a": ["two", "one"]}, ["inet a: 'two' stands where 'one' should"]),
        ({**WANTED, "inet a": ["one", ""]}, ["inet a: 'a rule without a name' stands where 'two' should"]),
        ({**WANTED, "inet a": ["one", "two", "x"]}, ["inet a: 'x' is not in the plan"]),
        ({**WANTED, "inet a": ["one", "two", ""]}, ["inet a: 'a rule without a name' is not in the plan"]),
    ],
)
def test_a_difference_in_words(there: dict[str, list[str]], sentences: list[str]) -> None:
    assert list(backend.differences(WANTED, there)) == sentences


DAMAGE = {
    "nft": (
        "nft flush chain inet tproxy_relay prerouting",
        "nft delete chain inet tproxy_relay output",
        "nft add rule inet tproxy_relay output accept",
        "nft insert rule inet tproxy_relay prerouting accept",
        "nft delete table inet tproxy_relay",
    ),
    "iptables-nft": (
        "iptables-nft -t mangle -F PREROUTING",
        "ip6tables-nft -t mangle -F TPROXY_RELAY_PRE",
        "iptables-nft -t mangle -D TPROXY_RELAY_OUT 1",
        "iptables-nft -t mangle -A TPROXY_RELAY_OUT -j ACCEPT",
    ),
}


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    "case",
    quickly(
        [(name, one) for name, some in DAMAGE.items() for one in some], *((n, some[0]) for n, some in DAMAGE.items())
    ),
)
def test_damage_is_seen_and_mended(case: tuple[str, str]) -> None:
    name, command = case
    where = backends.of_name(name)
    where.install(PLAN, "active")
    assert where.problems(PLAN, "active") == []
    programs.run(command.split())
    assert where.problems(PLAN, "active") != []
    where.install(PLAN, "active")
    assert where.problems(PLAN, "active") == []
    where.remove()


@pytest.fixture(params=["nft", "iptables-nft", "iptables-legacy"])
def where(request: pytest.FixtureRequest, require_or_skip: Callable[[str], NoReturn]) -> Backend:
    if programs.find(request.param) is None:
        require_or_skip(f"{request.param} is not installed")
    if request.param == "iptables-legacy" and not networks.LEGACY_IPTABLES:
        pytest.skip("legacy iptables need the real root")
    return backends.of_name(request.param)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("former", [None, "inbound"])
def test_things_can_be_put_back_as_they_were(where: Backend, former: str | None) -> None:
    if former:
        where.install(VARIANTS[former], "active")
    put_back = where.remember()
    where.install(PLAN, "active")
    put_back()
    if former:
        assert where.problems(VARIANTS[former], "active") == []
    else:
        assert where.counts() == []


def test_only_iptables_needs_other_rules_to_refuse() -> None:
    assert Nft().refuses_without_listener and not Iptables("-nft").refuses_without_listener
    assert set(Nft().expected(PLAN, "active")) == {
        f"inet {chain}" for chain in ("from_lo", "errors", "answered", "prerouting", "own_errors", "output")
    }
    assert f"6 {PREFIX}PRE" in Iptables("-nft").expected(PLAN, "active")
