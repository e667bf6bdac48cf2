"""A table that goes with its owner."""

import os
import select
import signal

import pytest
from deadlines import wait_until
from plans import PLAN

from tproxy_relay.errors import RelayError
from tproxy_relay.intercept import nft, programs
from tproxy_relay.intercept.nft_owner import NftOwner
from tproxy_relay.intercept.programs import ProgramError

pytestmark = pytest.mark.usefixtures("network")


def is_there() -> bool:
    return "tproxy_relay" in programs.run(["nft", "list", "tables"]).stdout


def held() -> NftOwner:
    owner = NftOwner()
    owner.load(nft.script(PLAN, "active", held=True))
    assert is_there() and owner.alive
    return owner


def test_it_goes_when_the_owner_is_closed() -> None:
    owner = held()
    owner.close()
    assert not is_there() and not owner.alive
    owner.close()


def test_it_goes_when_the_owner_is_killed_and_that_is_noticed() -> None:
    owner = held()
    os.kill(owner.pid, signal.SIGKILL)
    assert select.select([owner], [], [], 5)[0] and owner.has_ended()
    assert not owner.alive
    wait_until(lambda: not is_there(), "the table is gone")
    with pytest.raises((ProgramError, OSError)):
        owner.load(nft.script(PLAN, "active", held=True))
    owner.close()


@pytest.mark.parametrize(
    "command", ["delete table inet tproxy_relay", "flush ruleset", "flush table inet tproxy_relay"]
)
def test_nobody_else_changes_it(command: str) -> None:
    owner = held()
    programs.run(["nft", *command.split()], check=False)
    assert "TCP only" in programs.run(["nft", "list", "ruleset"]).stdout
    owner.load(nft.change(PLAN, "draining", held=True))
    assert "draining: TCP only" in programs.run(["nft", "list", "ruleset"]).stdout
    owner.close()


def test_what_nft_refuses_is_told_and_changes_nothing() -> None:
    owner = held()
    before = programs.run(["nft", "list", "ruleset"]).stdout
    for wrong in (
        "nonsense",
        "table inet tproxy_relay { chain x { jump nowhere } }",
        nft.change(PLAN, "active") + "oops",
    ):
        with pytest.raises(ProgramError, match="nft -i.* failed: .*[Ee]rror"):
            owner.load(wrong)
        assert programs.run(["nft", "list", "ruleset"]).stdout == before
    owner.load(nft.change(PLAN, "draining", held=True))
    owner.close()


def test_a_table_of_an_owner_is_not_taken_over() -> None:
    first, second = held(), NftOwner()
    with pytest.raises(RelayError):
        second.load(nft.script(PLAN, "active", held=True))
    second.close()
    assert is_there()
    first.close()
