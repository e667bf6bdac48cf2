"""What nftables has, also where nft cannot say it in one piece."""

import shutil
from pathlib import Path

import pytest
from plans import PLAN

from tproxy_relay.intercept import foreign_nat, nft_listing, programs
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.programs import ProgramError

pytestmark = pytest.mark.usefixtures("network")

NAT = "table ip docker { chain pre { type nat hook prerouting priority -100; tcp dport 8000 dnat to 192.0.2.1; }; }"
STUMBLES = """#!/bin/sh
case "$*" in *"list ruleset"*|*"list table "*) printf '{"nftables": [{"flags": "\\001' ;; *) exec REAL "$@" ;; esac
"""


@pytest.fixture
def stumbling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nft 1.0.6 with an owner in memory that spells no JSON: the real one, but for these two answers."""
    real = shutil.which("nft", path=programs.search_path())
    (tmp_path / "nft").write_text(STUMBLES.replace("REAL", str(real)), encoding="ascii")
    (tmp_path / "nft").chmod(0o755)
    before = programs.search_path()
    monkeypatch.setattr(programs, "search_path", lambda: f"{tmp_path}:{before}")


def test_a_table_by_its_chains(stumbling: None) -> None:
    assert nft_listing.table("inet", "tproxy_relay") == []
    Nft().install(PLAN, "active")
    programs.run(["nft", "-f", "-"], NAT)
    assert Nft().problems(PLAN, "active") == [], "the guard would have trouble, or put back what is there"
    assert {one["rule"]["table"] for one in nft_listing.table("ip", "docker") if "rule" in one} == {"docker"}


def test_the_ruleset_by_its_chains(stumbling: None) -> None:
    Nft().install(PLAN, "active")
    assert not foreign_nat.rewrites_destinations()
    programs.run(["nft", "-f", "-"], NAT)
    assert foreign_nat.rewrites_destinations(), "as many a reload would have overlooked it"


def test_what_is_not_there() -> None:
    assert nft_listing.table("inet", "nobodys") == []
    with pytest.raises(ProgramError, match="failed"):
        nft_listing.table("nonsense", "nobodys")
