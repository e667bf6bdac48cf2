"""The relay's end: what the log says of the ruleset's life, and what happens when the guard dies."""

import os
import signal
from collections.abc import Iterator

import lines as lines_module
import pytest
from deadlines import wait_until
from lines import Lines, fields
from plans import PLAN

from tproxy_relay import errors
from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.intercept import managed, programs, ruleset
from tproxy_relay.intercept.managed import Interception

in_network = pytest.mark.usefixtures("network")


@pytest.fixture
def said() -> Iterator[Lines]:
    with lines_module.collected() as lines:
        yield lines


def kill_guard(interception: Interception) -> int:
    pid = interception._guard.pid
    os.kill(pid, signal.SIGKILL)
    return pid


def state() -> str:
    return ruleset.status(PLAN).state


@in_network
def test_a_life(said: Lines) -> None:
    interception = Interception(PLAN, "nft")
    interception.install()
    assert state() == "active"
    assert fields(said.of("ruleset installed")[0]) == {"backend": "nft", "plan": PLAN.digest}
    interception.drain()
    assert state() == "draining" and said.of("ruleset draining")
    interception.remove()
    assert state() == "absent" and said.of("ruleset removed")
    assert [record.levelname for record in said.records] == ["INFO"] * 3


@in_network
@pytest.mark.parametrize("drained", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_guard_that_was_killed_is_replaced_in_the_same_state(said: Lines, drained: bool) -> None:
    interception = Interception(PLAN, "nft")
    interception.install()
    if drained:
        interception.drain()
    old = kill_guard(interception)
    wait_until(lambda: said.of("ruleset restored"), "it says so")
    assert said.of("the guard of the ruleset has died, starting another one")
    assert fields(said.of("ruleset restored")[0]) == {"what": "the guard had died"}
    assert said.of("ruleset restored")[0].levelname == "WARNING"
    assert interception._guard.pid != old
    assert state() == ("draining" if drained else "active")
    interception.remove()
    assert state() == "absent"


@in_network
def test_a_stop_just_after_the_guards_death_leaves_nothing(said: Lines) -> None:
    interception = Interception(PLAN, "iptables-nft")
    interception.install()
    kill_guard(interception)
    interception.remove()
    assert state() == "absent" and said.of("ruleset removed")


@in_network
@pytest.mark.slow
def test_what_was_put_back_is_a_warning(said: Lines) -> None:
    interception = Interception(PLAN, "nft")
    interception.install()
    programs.run("ip rule del pref 7008".split())
    wait_until(lambda: said.of("ruleset restored"), "it is put back")
    assert "pref 7008" in str(fields(said.of("ruleset restored")[0])["what"])
    interception.remove()


@in_network
def test_what_kept_the_guard_from_it_is_raised_here() -> None:
    programs.run("ip route add 192.0.2.0/24 dev lo table 7006".split())
    with pytest.raises(SystemRefusedError, match="routing table 7006"):
        Interception(PLAN, "nft").install()
    assert state() == "absent"


@pytest.mark.parametrize(
    "kind", [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.RelayError)]
)
def test_an_error_keeps_its_exit_code(kind: type[errors.RelayError]) -> None:
    error = managed._error({"message": "why", "exit_code": kind.exit_code})
    assert (str(error), error.exit_code) == ("why", kind.exit_code)
