"""The relay's end: what the log says of the ruleset's life, and what happens when the guard dies."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lines as lines_module
import pytest
from deadlines import wait_until
from lines import Lines, fields
from plans import PLAN, PORTS

from tproxy_relay.errors import RelayError, SystemRefusedError
from tproxy_relay.guard import guard_client
from tproxy_relay.guard.guard_client import Interception
from tproxy_relay.intercept import lock, programs, routing, ruleset
from tproxy_relay.intercept.backend_nft import Nft
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.ipc import channel
from tproxy_relay.settings import PortRange

OTHER = replace(PLAN, inbound=(*PORTS, PortRange(22, 22)))
CLOSED = replace(PLAN, on_failure="closed")
OTHER_CLOSED = replace(OTHER, on_failure="closed")

in_network = pytest.mark.usefixtures("network")


@pytest.fixture
def said() -> Iterator[Lines]:
    with lines_module.collected() as lines:
        yield lines


def guards() -> list[int]:
    """The guards in this network."""
    here, found = os.readlink("/proc/self/ns/net"), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "ns/net") == here and b"tproxy_relay.guard" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def kill_guard(interception: Interception) -> int:
    (pid,) = guards()
    os.kill(pid, signal.SIGKILL)
    return pid


def state(plan: Plan = PLAN) -> str:
    return ruleset.status(plan).state


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
    assert guards() != [old]
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


# --- another plan


@in_network
def test_another_plan_and_back(said: Lines) -> None:
    interception = Interception(PLAN, "nft")
    interception.install()
    assert interception.health == ("active", "nft", PLAN.digest, None)
    for plan in (OTHER, CLOSED, PLAN, OTHER):
        interception.replace(plan)
        assert state(plan) == "active"
        assert interception.health == ("active", "nft", plan.digest, None)
    assert fields(said.of("ruleset replaced")[-1]) == {"backend": "nft", "plan": OTHER.digest}
    kill_guard(interception)
    wait_until(lambda: said.of("ruleset restored"), "the next guard has installed")
    assert state(OTHER) == "active", "the plan that was in force"
    interception.drain()
    assert state(OTHER) == "draining"
    interception.remove()
    assert state() == "absent" and not said.of("ruleset replaced")[4:]


@in_network
def test_what_kept_it_from_replacing_is_raised_and_the_old_plan_stays() -> None:
    interception = Interception(PLAN, "nft")
    interception.install()
    programs.run("ip -6 route add 2001:db8::/64 dev lo table 7006".split())
    with pytest.raises(SystemRefusedError, match="routing table 7006"):
        interception.replace(OTHER)
    assert interception.health.plan == PLAN.digest and not ruleset.Ruleset(PLAN, Nft()).problems("active")
    interception.remove()


@in_network
@pytest.mark.parametrize("killed_at", [0.0, 0.01, 0.03])
def test_a_guard_that_dies_while_it_replaces_leaves_the_old_plan(said: Lines, killed_at: float) -> None:
    """Or it was quicker, and then the next one has the new plan."""
    interception = Interception(CLOSED, "nft")
    interception.install()
    (pid,) = guards()
    threading.Timer(killed_at, lambda: os.kill(pid, signal.SIGKILL)).start()
    in_force = OTHER_CLOSED
    try:
        interception.replace(OTHER_CLOSED)
    except RelayError as error:
        assert "the guard of the ruleset has died" in str(error)
        in_force = CLOSED
    wait_until(lambda: said.of("ruleset restored"), "the next guard has installed")
    assert state(in_force) == "active" and interception.health.plan == in_force.digest
    wait_until(lambda: len(guards()) == 1, "there is one guard")
    interception.replace(PLAN)
    interception.remove()
    assert state() == "absent"


@in_network
def test_a_guard_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, said: Lines) -> None:
    monkeypatch.setattr(guard_client, "INSTALL_TIMEOUT", 30)
    interception = Interception(PLAN, "nft")
    interception.install()
    (pid,) = guards()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(guard_client, "INSTALL_TIMEOUT", 0.1)
    with pytest.raises(RelayError, match="did not answer within 0.1 s"):
        interception.replace(OTHER)
    os.kill(pid, signal.SIGCONT)
    interception.drain()  # it is asked for that after the rest
    wait_until(lambda: state(PLAN) == "draining", "what it does too late is undone")
    assert interception.health.plan == PLAN.digest
    interception.remove()


@in_network
def test_a_plan_that_is_too_long_for_a_message() -> None:
    many = tuple(PortRange(port, port) for port in range(1, 60001, 2))
    with pytest.raises(RelayError, match="name fewer ranges of ports"):
        Interception(replace(PLAN, inbound=many), "nft")
    interception = Interception(PLAN, "nft")
    interception.install()
    with pytest.raises(RelayError, match="name fewer ranges of ports"):
        interception.replace(replace(PLAN, inbound=many))
    assert state() == "active"
    interception.remove()


@in_network
@pytest.mark.slow
def test_trouble_is_known_until_it_is_over(said: Lines) -> None:
    interception = Interception(CLOSED, "nft")
    interception.install()
    programs.run("ip -6 route add 2001:db8::/64 dev lo table 7006".split())
    programs.run("ip -6 rule del pref 7008".split())
    wait_until(lambda: interception.health.trouble, "the guard cannot put the rule back")
    assert "routing table 7006" in str(interception.health.trouble)
    programs.run(f"ip -6 rule add {routing.rules(CLOSED)[-1]}".split())
    wait_until(lambda: interception.health.trouble is None, "somebody else has put it back")
    assert not said.of("ruleset restored")
    interception.remove()


# --- another supervisor


def handed_over(one: Interception, plan: Plan = PLAN) -> Interception:
    talk, theirs = channel.pair()
    one.hand_over(theirs.fileno(), 4711)
    theirs.close()
    return Interception.take_over(talk, plan, "nft")


def ends(one: Interception) -> None:
    """For the guard it is as if the process had ended."""
    with socket.socket(fileno=os.dup(one.debug_state()["channel"])) as sock:
        sock.shutdown(socket.SHUT_RDWR)


@in_network
def test_a_guard_that_is_handed_over(said: Lines) -> None:
    one = Interception(PLAN, "nft")
    one.install()
    guard = guards()
    other = handed_over(one, OTHER)
    found = lock.holder()
    assert found is not None and found.pid == 4711
    assert fields(said.of("ruleset taken over")[0]) == {"backend": "nft", "plan": PLAN.digest}
    assert one.health.state == "gone"
    one.drain()
    one.remove()
    assert state(PLAN) == "active", "and nothing that it does matters"
    ends(one)
    other.replace(OTHER)
    assert state(OTHER) == "active" and guards() == guard
    other.drain()
    assert state(OTHER) == "draining"
    other.remove()
    assert state() == "absent"
    assert {record.levelname for record in said.records} == {"INFO"}


@in_network
def test_the_guard_lets_go_of_the_first_ones_standard_error() -> None:
    one = Interception(PLAN, "nft")
    one.install()
    other = handed_over(one)
    os.dup2(os.pipe()[1], 2)  # this process is the test's own
    other.replace(PLAN)
    assert os.readlink(f"/proc/{guards()[0]}/fd/2") == os.readlink("/proc/self/fd/2")
    ends(one)
    other.remove()


@in_network
@pytest.mark.slow
def test_a_guard_that_dies_after_it_was_handed_over_is_replaced_by_the_second(said: Lines) -> None:
    one = Interception(PLAN, "nft")
    one.install()
    other = handed_over(one, OTHER)
    kill_guard(other)
    wait_until(lambda: said.of("ruleset restored"), "there is another guard")
    assert len(said.of("the guard of the ruleset has died, starting another one")) == 1
    assert state(OTHER) == "active", "with the plan of the second"
    other.replace(PLAN)
    other.remove()
    assert state() == "absent"


@in_network
def test_a_guard_that_dies_before_it_serves_is_replaced_by_the_second(said: Lines) -> None:
    one = Interception(PLAN, "nft")
    one.install()
    (pid,) = guards()
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.1, lambda: os.kill(pid, signal.SIGKILL)).start()
    other = handed_over(one, OTHER)
    assert state(OTHER) == "active" and said.of("ruleset installed")[1:]
    wait_until(lambda: one.health.state == "gone", "the first one has let go")
    assert guards() != [pid] and len(guards()) == 1
    other.remove()


@in_network
def test_a_guard_that_is_dead_is_not_handed_over_and_the_next_relay_starts_its_own(said: Lines) -> None:
    one = Interception(PLAN, "nft")
    one.install()
    kill_guard(one)
    wait_until(lambda: said.of("the guard of the ruleset has died, starting another one"), "it is known")
    with pytest.raises(RelayError, match="has died, try again"):
        one.replace(OTHER)
    other = handed_over(one)
    one.remove()
    assert state() == "active" and len(guards()) == 1
    other.remove()
    assert state() == "absent"


@in_network
def test_who_takes_over_from_a_drained_one_takes_new_connections_again() -> None:
    one = Interception(PLAN, "nft")
    one.install()
    one.drain()
    other = handed_over(one)
    assert other.health.state == "draining"
    other.replace(PLAN)
    assert state() == "active"
    ends(one)
    other.remove()


# --- after a hand-over


def caught() -> list[int]:
    """The signals that this process is sent from now on; it is the test's own."""
    signals: list[int] = []
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda number, _: signals.append(number))
    return signals


@in_network
def test_one_that_has_handed_over_drains_once_when_the_other_one_leaves(said: Lines) -> None:
    signals = caught()
    one = Interception(PLAN, "nft")
    one.install()
    other = handed_over(one)
    other.drain()
    wait_until(lambda: signals, "it drains")
    other.remove()
    assert said.of("ruleset stays until the relay before this one has ended") and not said.of("ruleset removed")
    assert other.health.state == "lingering" and state() == "draining"
    assert not signals[1:], "TERM again would mean at once"
    one.remove()
    ends(one)
    wait_until(lambda: state() == "absent", "the guard has removed it")
    assert signals == [signal.SIGTERM] and {record.levelname for record in said.records} == {"INFO"}


@in_network
def test_one_that_drains_already_is_not_told_to(said: Lines) -> None:
    signals = caught()
    one = Interception(PLAN, "nft")
    one.install()
    other = handed_over(one)
    one.drain()
    other.drain()
    other.remove()
    with Lock():
        assert signals == [signal.SIGINT], "only when the rules go before its last connections"
        assert state() == "absent"
