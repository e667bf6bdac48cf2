"""The guard as a process: what it answers, and what is left when the relay's end of the channel is closed."""

import os
import select
import signal
import threading
from dataclasses import replace
from typing import Any

import pytest
from deadlines import PATIENCE, wait_until
from guards import GuardChild, answer, guarding, holders
from plans import PLAN, PORTS, VARIANTS, quickly

from tproxy_relay.guard import formers as formers_module
from tproxy_relay.guard import guard
from tproxy_relay.guard.messages import Start
from tproxy_relay.intercept import backends, lock
from tproxy_relay.intercept import plan as plans
from tproxy_relay.intercept import programs, ruleset
from tproxy_relay.intercept.plan import Plan
from tproxy_relay.ipc import channel
from tproxy_relay.ipc.channel import Channel
from tproxy_relay.settings import PortRange

CLOSED = replace(PLAN, on_failure="closed")
MORE_PORTS = replace(PLAN, inbound=(*PORTS, PortRange(22, 22)), outbound=PORTS[:1])
OTHER_CHAINS = replace(PLAN, beside_nat=True)

in_network = pytest.mark.usefixtures("network")


def state_of(plan: Plan) -> str:
    return ruleset.status(plan).state


def everything() -> list[str]:
    looks = [
        "nft -s list ruleset",
        *(f"ip -{family} {what}" for family in "46" for what in ("rule", "route show table all")),
    ]
    return [programs.run(look.split()).stdout for look in looks]


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_it_drains_and_removes_when_told(name: str) -> None:
    with guarding(name=name) as running:
        assert running.answer() == {"event": "installed", "backend": name, "state": "active"}
        assert state_of(PLAN) == "active"
        running.order("drain")
        assert running.answer() == {"event": "changed", "state": "draining"}
        assert state_of(PLAN) == "draining"
        running.order("remove")
        assert running.answer() == {"event": "changed", "state": "removed", "pid": running.child.pid}
        assert state_of(PLAN) == "absent"
        assert running.child.wait(PATIENCE) == 0


@in_network
@pytest.mark.parametrize(
    "plan, name, left",
    [
        (PLAN, "nft", "absent"),
        (PLAN, "iptables-nft", "absent"),
        (CLOSED, "nft", "active"),
        (CLOSED, "iptables-nft", "closed"),
    ],
)
def test_what_is_left_when_the_relay_dies(plan: Plan, name: str, left: str) -> None:
    with guarding(plan, name) as running:
        assert running.answer()["event"] == "installed"
        assert running.part() == 0
        assert state_of(plan) == left
    ruleset.remove()
    assert state_of(plan) == "absent"


@in_network
def test_a_relay_that_dies_while_draining_leaves_nothing() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        running.order("drain")
        running.answer()
        running.part()
        assert state_of(CLOSED) == "absent"


@in_network
def test_it_can_begin_with_draining() -> None:
    with guarding(state="draining") as running:
        assert running.answer()["state"] == "draining"
        assert state_of(PLAN) == "draining"


@in_network
def test_it_holds_the_lock_for_the_relay_and_a_second_one_fails() -> None:
    with guarding() as running:
        running.answer()
        found = lock.holder()
        assert found is not None and found.pid == 4711
        with guarding() as second:
            failed = second.answer()
            assert (failed["event"], failed["exit_code"]) == ("failed", 71)
        assert state_of(PLAN) == "active"


@in_network
def test_what_keeps_it_from_installing_is_told() -> None:
    programs.run("ip route add 192.0.2.0/24 dev lo table 7006".split())
    with guarding() as running:
        failed = running.answer()
        assert (failed["event"], failed["exit_code"]) == ("failed", 71)
        assert "routing table 7006" in failed["message"]
        assert running.child.wait(PATIENCE) == 71
    assert backends.present() == []


@in_network
@pytest.mark.slow
def test_what_somebody_takes_away_is_put_back() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        programs.run(["nft", "flush", "ruleset"])
        programs.run("ip rule del pref 7007".split())
        restored = running.answer()
        assert restored["event"] == "restored"
        assert "inet prerouting: missing" in restored["what"] and "pref 7007" in restored["what"]
        assert state_of(CLOSED) == "active"


@in_network
def test_a_table_whose_owner_was_killed_is_put_back() -> None:
    with guarding() as running:
        running.answer()
        (holder,) = holders(running)
        os.kill(holder, signal.SIGKILL)
        assert "the process that held the table had died" in running.answer()["what"]
        assert state_of(PLAN) == "active"
        assert running.part() == 0
    assert state_of(PLAN) == "absent"


@in_network
def test_without_an_owner_the_guard_takes_the_table_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.12 there is no such flag."""

    def refuse(*_: object) -> None:
        raise programs.ProgramError("no such flag")

    monkeypatch.setattr(guard.NftOwner, "load", refuse)
    talk, theirs = channel.pair()
    one = guard.Guard(theirs, Start(PLAN, "nft", "active", 1))
    assert one.backend == "nft" and state_of(PLAN) == "active"
    watching = threading.Thread(target=one.watch)
    watching.start()
    for plan in (CLOSED, MORE_PORTS):
        talk.send({"order": "replace", "plan": plans.to_json(plan), "pid": 1})
        assert answer(talk)["event"] == "replaced" and state_of(plan) == "active"
    talk.close()
    watching.join(PATIENCE)
    assert not watching.is_alive() and state_of(MORE_PORTS) == "absent"


# --- another plan


def replaced(running: GuardChild, plan: Plan, **more: object) -> dict[str, Any]:
    running.order("replace", plan=plans.to_json(plan), pid=4712, **more)
    return running.answer()


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_another_plan_takes_the_place_of_the_first(name: str) -> None:
    with guarding(name=name) as running:
        running.answer()
        for plan in (MORE_PORTS, OTHER_CHAINS, VARIANTS["loopback"], PLAN):
            assert replaced(running, plan) == {"event": "replaced", "plan": plan.digest, "state": "active"}
            assert state_of(plan) == "active"
        found = lock.holder()
        assert found is not None and found.pid == 4712
        running.order("remove")
        assert running.answer() == {"event": "changed", "state": "removed", "pid": running.child.pid}
    assert state_of(PLAN) == "absent"


@in_network
def test_the_plan_that_is_there_is_not_touched() -> None:
    with guarding() as running:
        running.answer()
        before, holder = backends.of_name("nft").counts(), holders(running)
        generation = programs.run(["nft", "-a", "list", "ruleset"]).stdout
        assert replaced(running, PLAN)["event"] == "replaced"
        assert programs.run(["nft", "-a", "list", "ruleset"]).stdout == generation
        assert (backends.of_name("nft").counts(), holders(running)) == (before, holder)


@in_network
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_what_is_left_is_what_the_last_plan_says(name: str) -> None:
    """For nft the table is given up by its owner, and taken again."""
    with guarding(PLAN, name) as running:
        running.answer()
        assert replaced(running, CLOSED)["event"] == "replaced"
        assert holders(running) == []
        assert replaced(running, PLAN)["event"] == "replaced"
        assert len(holders(running)) == (name == "nft")
        assert replaced(running, CLOSED)["event"] == "replaced"
        running.part()
        assert state_of(CLOSED) == ("active" if name == "nft" else "closed")
    with guarding(CLOSED, name) as running:
        running.answer()
        assert replaced(running, PLAN)["event"] == "replaced"
        running.part()
        assert state_of(PLAN) == "absent"


@in_network
def test_a_table_that_was_taken_later_goes_with_the_guard_too() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        assert replaced(running, PLAN)["event"] == "replaced"
        running.child.kill()
        wait_until(lambda: backends.present() == [], "the kernel has taken the table away")


@in_network
def test_the_owner_of_a_table_that_was_taken_later_is_watched() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        assert replaced(running, PLAN)["event"] == "replaced"
        (holder,) = holders(running)
        os.kill(holder, signal.SIGKILL)
        assert running.answer()["what"] == "the process that held the table had died"
        assert state_of(PLAN) == "active"


@in_network
def test_a_table_that_was_given_up_stays_so_when_it_is_put_back() -> None:
    with guarding(PLAN) as running:
        running.answer()
        assert replaced(running, CLOSED)["event"] == "replaced"
        programs.run(["nft", "flush", "ruleset"])
        assert running.answer()["event"] == "restored"
        assert state_of(CLOSED) == "active" and holders(running) == []


@in_network
def test_a_drained_one_stays_drained_until_it_is_told_otherwise() -> None:
    with guarding() as running:
        running.answer()
        running.order("drain")
        running.answer()
        assert replaced(running, MORE_PORTS)["state"] == "draining" == state_of(MORE_PORTS)
        assert replaced(running, MORE_PORTS, state="active")["state"] == "active" == state_of(MORE_PORTS)


@in_network
@pytest.mark.parametrize("plan", [MORE_PORTS, CLOSED])
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_what_cannot_be_replaced_stays(name: str, plan: Plan) -> None:
    """The routing table is somebody else's, too, by then."""
    with guarding(name=name) as running:
        running.answer()
        before = everything()
        programs.run("ip -6 route add 2001:db8::/64 dev lo table 7006".split())
        refused = replaced(running, plan)
        assert (refused["event"], refused["exit_code"]) == ("refused", 71)
        assert "routing table 7006" in refused["message"]
        programs.run("ip -6 route del 2001:db8::/64 dev lo table 7006".split())
        assert everything() == before and state_of(PLAN) == "active"
        found = lock.holder()
        assert found is not None and found.pid == 4711
        assert replaced(running, plan)["event"] == "replaced"


@in_network
@pytest.mark.parametrize(
    "order, why",
    [
        ({"order": "replace", "plan": "{}", "pid": 1}, "of another version and does not understand this plan"),
        ({"order": "replace", "plan": plans.to_json(PLAN)[:-1] + ', "later": 1}', "pid": 1}, "of another version"),
        ({"order": "replace", "plan": 5, "pid": 1}, "of another version"),
        ({"order": "replace", "plan": plans.to_json(PLAN), "pid": 1, "state": "asleep"}, "of another version"),
        ({"order": "replace", "plan": plans.to_json(PLAN)}, "of another version"),
        ({"order": "sing"}, "does not know the order 'sing'"),
        ({}, "does not know the order None"),
        ({"order": "serve", "pid": 1}, "serve nobody"),
    ],
)
def test_an_order_of_another_version_is_refused(order: dict[str, Any], why: str) -> None:
    with guarding() as running:
        running.answer()
        running.talk.send(order)
        refused = running.answer()
        assert (refused["event"], refused["exit_code"]) == ("refused", 1) and why in refused["message"]
        assert state_of(PLAN) == "active"


# --- another supervisor


def followed(running: GuardChild, plan: Plan = PLAN, name: str = "nft") -> Channel:
    """Another supervisor takes the place of the one that there is; the channel of that one."""
    former, (running.talk, theirs) = running.talk, channel.pair()
    assert former.send({"order": "serve", "pid": 4713}, [theirs.fileno()])
    theirs.close()
    assert running.answer() == {"event": "serving", "backend": name, "plan": plan.digest, "state": "active"}
    return former


@in_network
def test_it_serves_another_one_and_the_first_ones_death_means_nothing() -> None:
    with guarding() as running:
        running.answer()
        first = followed(running)
        first.close()
        assert replaced(running, MORE_PORTS)["event"] == "replaced"
        found = lock.holder()
        assert found is not None and found.pid == 4712
        assert running.part() == 0
        assert state_of(MORE_PORTS) == "absent"


def has_open(running: GuardChild, path: str) -> bool:
    return path in {os.path.realpath(one.path) for one in os.scandir(f"/proc/{running.child.pid}/fd")}


@in_network
def test_what_is_no_channel_is_refused_and_the_first_one_is_served_on() -> None:
    with guarding() as running, open(__file__, "rb") as file:
        running.answer()
        for descriptors in ((file.fileno(),), (file.fileno(), file.fileno())):
            running.order("serve", *descriptors, pid=1)
            assert running.answer()["event"] == "refused"
            wait_until(lambda: not has_open(running, __file__), "it is closed")
        running.order("drain")
        assert running.answer()["state"] == "draining"


@in_network
def test_who_reads_the_first_ones_standard_error_sees_its_end() -> None:
    reader, writer = os.pipe()
    other_reader, other_writer = os.pipe()
    kept = os.dup(2)
    os.dup2(writer, 2)
    try:
        with guarding() as running:
            os.dup2(kept, 2)
            os.close(writer)
            running.answer()
            followed(running).close()
            running.order("replace", other_writer, plan=plans.to_json(MORE_PORTS), pid=4713)
            os.close(other_writer)
            assert running.answer()["event"] == "replaced"
            assert select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 1) == b""
            assert not select.select([other_reader], [], [], 0)[0], "the guard has the other one"
            former = followed(running, MORE_PORTS)
            running.talk.close()
            assert answer(former) == {"event": "orphaned"}
            assert select.select([other_reader], [], [], PATIENCE)[0] and os.read(other_reader, 1) == b""
            assert running.child.poll() is None, "it lingers"
    finally:
        os.dup2(kept, 2)


# --- relays before the present one


def is_there(running: GuardChild) -> bool:
    """It has done what it was told by now: it answers one who looks, in its own name."""
    found = lock.holder()
    return found is not None and found.pid == running.child.pid


@in_network
@pytest.mark.parametrize("ordered", [True, False], ids=["removed", "killed"])
@pytest.mark.parametrize("name", quickly(["nft", "iptables-nft"], "nft"))
def test_it_lingers_until_the_last_former_one_is_gone(name: str, ordered: bool) -> None:
    with guarding(name=name) as running:
        running.answer()
        formers = [followed(running, name=name) for _ in range(3)]
        formers.pop(1).close()
        if ordered:
            running.order("remove")
            assert running.answer() == {"event": "changed", "state": "draining"}
            assert running.answer() == {"event": "changed", "state": "lingering"}
        running.talk.close()
        for former in formers:
            assert answer(former) == {"event": "orphaned"}
            assert is_there(running) and state_of(PLAN) == "draining"
        for holder in holders(running):
            os.kill(holder, signal.SIGKILL)
            wait_until(lambda: state_of(PLAN) == "draining", "it is put back")
        formers[1].close()
        assert is_there(running) and state_of(PLAN) == "draining"
        formers[0].close()
        assert running.child.wait(PATIENCE) == 0
        assert state_of(PLAN) == "absent"


@in_network
def test_the_one_that_stays_may_be_the_last_to_go() -> None:
    with guarding() as running:
        running.answer()
        former = followed(running)
        running.order("drain")
        assert running.answer()["state"] == "draining"
        assert answer(former) == {"event": "orphaned"}
        running.order("remove")
        assert running.answer()["state"] == "lingering", "it drains already"
        former.close()
        assert running.answer() == {"event": "changed", "state": "removed", "pid": running.child.pid}
        assert state_of(PLAN) == "absent" and lock.holder() is None
        assert running.child.wait(PATIENCE) == 0


@in_network
def test_what_a_former_one_says_means_nothing() -> None:
    reader, writer = os.pipe()
    with guarding() as running:
        running.answer()
        former = followed(running)
        assert former.send({"order": "remove"}, [writer])
        os.close(writer)
        assert select.select([reader], [], [], PATIENCE)[0] and os.read(reader, 1) == b""
        assert replaced(running, MORE_PORTS)["state"] == "active" == state_of(MORE_PORTS)


@in_network
@pytest.mark.parametrize("obeys", [True, False])
def test_one_that_wants_the_ruleset_gets_it_when_the_former_ones_have_reset_their_connections(obeys: bool) -> None:
    with guarding() as running:
        running.answer()
        former = followed(running)
        running.talk.close()
        assert answer(former) == {"event": "orphaned"}
        with guarding(MORE_PORTS) as wants:
            assert answer(former) == {"event": "orphaned", "at_once": True}
            assert state_of(PLAN) == "draining"
            if obeys:
                former.close()
            assert wants.answer()["event"] == "installed"
            assert running.child.wait(PATIENCE) == 0
            assert state_of(MORE_PORTS) == "active"
        former.close()


@in_network
def test_rules_that_refuse_stay_when_it_cannot_linger() -> None:
    with guarding(CLOSED) as running:
        running.answer()
        former = followed(running, CLOSED)
        assert running.part() == 0
        assert answer(former) == {"event": "orphaned"} and former.receive(PATIENCE) is None
        assert state_of(CLOSED) == "active"


@in_network
def test_iptables_refuses_when_the_former_one_is_gone() -> None:
    with guarding(CLOSED, "iptables-nft") as running:
        running.answer()
        former = followed(running, CLOSED, "iptables-nft")
        running.talk.close()
        assert answer(former) == {"event": "orphaned"}
        found = lock.holder()
        assert found is not None and found.pid == 4713, "it answers, and waits"
        assert state_of(CLOSED) == "active"
        former.close()
        assert running.child.wait(PATIENCE) == 0
        assert state_of(CLOSED) == "closed"


@in_network
def test_iptables_does_not_wait_for_ever_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "CLOSED_TIMEOUT", 0.1)
    monkeypatch.setattr(formers_module, "FAREWELL_TIMEOUT", 0.1)
    (former, theirs), (second, seconds) = channel.pair(), channel.pair()
    one = guard.Guard(theirs, Start(CLOSED, "iptables-nft", "active", 1))
    former.send({"order": "serve", "pid": 2}, [seconds.fileno()])
    seconds.close()
    second.close()
    one.watch()
    assert [answer(former), answer(former)] == [{"event": "orphaned"}, {"event": "orphaned", "at_once": True}]
    assert state_of(CLOSED) == "closed"
