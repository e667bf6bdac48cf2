"""Rules by nft: one table, of an owner or of nobody."""

from pathlib import Path

import pytest
from plans import PLAN, VARIANTS

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import programs
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.plan import Plan, State
from tproxy_relay.intercept.programs import ProgramError

in_network = pytest.mark.usefixtures("network")


def table() -> str:
    return programs.run(["nft", "list", "table", "inet", "tproxy_relay"], check=False).stdout


def has(plan: Plan, state: State = "active") -> bool:
    """Whether the table is that of this plan. Not asked for in JSON: nft 1.0.6 has no word for `flags owner`, and
    prints whatever is in memory there."""
    return f"plan {plan.digest} {state}: TCP only" in table()


@pytest.mark.parametrize("script", ["echo '{}'", "echo hello"])
def test_nonsense_is_no_answer(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nft").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nft").chmod(0o755)
    monkeypatch.setattr(programs, "search_path", lambda: str(tmp_path))
    with pytest.raises(ProgramError, match="did not answer in JSON"):
        Nft().counts()


@in_network
def test_a_table_of_an_owner_goes_with_it() -> None:
    where = Nft(hold=True)
    assert not where.remove()
    where.install(PLAN, "active")
    owner = where.owner
    assert owner is not None and owner.alive and has(PLAN)
    where.install(VARIANTS["inbound"], "active")
    assert where.owner is owner and has(VARIANTS["inbound"])
    where.change(VARIANTS["inbound"], "draining")
    assert has(VARIANTS["inbound"], "draining")
    assert where.remove() and where.owner is None and not owner.alive and table() == ""


@in_network
def test_a_table_is_given_up_and_taken_again() -> None:
    where = Nft(hold=True)
    where.install(PLAN, "active")
    where.replace(VARIANTS["closed"], "active", hold=False)
    assert where.owner is None and where.problems(VARIANTS["closed"], "active") == []
    where.replace(PLAN, "active", hold=True)
    assert where.owner is not None and has(PLAN)
    assert where.remove() and table() == ""


@in_network
def test_what_nft_refuses_leaves_no_owner() -> None:
    """The table is of another one."""
    first, second = Nft(hold=True), Nft(hold=True)
    first.install(PLAN, "active")
    with pytest.raises(RelayError):
        second.install(PLAN, "active")
    assert second.owner is None and has(PLAN)
    first.remove()


@in_network
def test_counters_are_read() -> None:
    where = Nft()
    where.install(PLAN, "active")
    counts = where.counts()
    assert {(one.family, one.chain) for one in counts} == {
        ("inet", chain) for chain in ("from_lo", "errors", "answered", "prerouting", "own_errors", "output")
    }
    assert any(one.packets == one.bytes == 0 for one in counts)
