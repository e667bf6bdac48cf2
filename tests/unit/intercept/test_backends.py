"""Which backend is chosen, and which have something of ours."""

from collections.abc import Callable

import pytest
from plans import PLAN

from tproxy_relay.errors import CapabilityMissingError
from tproxy_relay.intercept import backends
from tproxy_relay.intercept.backend_iptables import Iptables
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.programs import ProgramError

# --- choosing


@pytest.mark.parametrize("name", ["nft", "iptables-nft", "iptables-legacy"])
def test_a_backend_by_its_name(name: str) -> None:
    assert backends.of_name(name).name == backends.choose(name, PLAN).name == name


def test_auto_is_nft_if_that_takes_the_plan(only: Callable[..., None]) -> None:
    only(nft='[ "$*" = "-c -f -" ]', iptables_restore="exit 0")
    assert isinstance(backends.choose("auto", PLAN, warn=pytest.fail), Nft)
    assert isinstance(backends.preferred(), Nft)


@pytest.mark.parametrize("nft", [{"nft": "echo 'Error: No such file'; exit 1"}, {}])
def test_auto_falls_back_to_iptables_and_says_why(nft: dict[str, str], only: Callable[..., None]) -> None:
    only(**nft, iptables_restore="exit 0")
    said: list[str] = []
    chosen = backends.choose("auto", PLAN, warn=said.append)
    assert isinstance(chosen, Iptables) and chosen.name == "iptables"
    assert len(said) == 1 and said[0].startswith("using iptables, because nft does not work here: ")
    assert backends.preferred().name == ("nft" if nft else "iptables")


def test_neither_works(only: Callable[..., None]) -> None:
    only(nft="echo broken; exit 1")
    with pytest.raises(ProgramError, match="neither nft nor iptables works here: .*broken"):
        backends.choose("auto", PLAN)


def test_without_the_right_another_backend_would_be_no_better(only: Callable[..., None]) -> None:
    only(nft="echo Operation not permitted; exit 1", iptables_restore="exit 0")
    with pytest.raises(CapabilityMissingError):
        backends.choose("auto", PLAN)


@pytest.mark.parametrize(
    "version, named, name",
    [
        ("nf_tables", "iptables_nft_save", "iptables-nft"),
        ("legacy", "iptables_legacy_save", "iptables-legacy"),
        ("legacy", "iptables_nft_save", "iptables"),
    ],
)
def test_iptables_is_one_of_the_two(version: str, named: str, name: str, only: Callable[..., None]) -> None:
    only(**{"iptables": f"echo 'iptables v1.8.9 ({version})'", named: "exit 0"})
    assert backends.of_name("iptables").name == name


@pytest.mark.parametrize(
    "ip6tables_save, possible",
    [("exit 0", True), ("echo 'no such table' >&2; exit 3", False), ("echo 'Permission denied' >&2; exit 4", True)],
)
def test_a_family_for_which_the_programs_do_not_work(
    ip6tables_save: str, possible: bool, only: Callable[..., None]
) -> None:
    assert backends.can_do("nft", PLAN, 6)
    only(iptables="echo legacy", iptables_save="exit 0")
    assert backends.can_do("iptables", PLAN, 4) and not backends.can_do("iptables", PLAN, 6), "there is none"
    only(ip6tables_save=ip6tables_save)
    assert backends.can_do("iptables", PLAN, 6) is possible


# --- what is there


def test_one_that_cannot_say_is_passed_over(only: Callable[..., None]) -> None:
    only(nft="echo 'Error: No such file or directory' >&2; exit 1", iptables_save="exit 4")
    assert backends.present() == []


def test_nobody_may_say(only: Callable[..., None]) -> None:
    only(nft="echo 'Operation not permitted' >&2; exit 1")
    with pytest.raises(CapabilityMissingError):
        backends.present()


@pytest.mark.usefixtures("network")
def test_those_that_have_something_are_found() -> None:
    assert backends.present() == []
    Nft().install(PLAN, "active")
    Iptables("-nft").install(PLAN, "active")
    assert [one.name for one in backends.present()] == ["nft", "iptables-nft"]
    Nft().remove()
    assert [one.name for one in backends.present()] == ["iptables-nft"]
