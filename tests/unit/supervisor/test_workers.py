"""Real workers, several of them: what becomes of them, and what is counted of them."""

import json
import os
import signal
from dataclasses import replace

import loopback
import pytest
from deadlines import wait_until
from hands import Hands
from hypothesis import given
from hypothesis import strategies as st
from lines import fields
from loopback import FIN

from tproxy_relay.errors import SystemRefusedError
from tproxy_relay.ipc.scoreboard import NO_NUMBERS, SLOTS, Numbers
from tproxy_relay.outcome import Outcome
from tproxy_relay.supervisor import workers
from tproxy_relay.supervisor.worker_process import Stage
from tproxy_relay.supervisor.workers import HANDSHAKE_GRACE, last_clients, with_lost


def test_a_life(hands: Hands) -> None:
    (worker,) = hands.start()
    assert hands.logged("worker started") == [{"pid": worker.pid, "generation": 1}]
    assert hands.workers.of(hands.generation) == [worker]
    assert hands.workers.of(replace(hands.generation, number=2)) == []
    waiting = loopback.dial(hands.address[:2])  # in the backlog, before anybody serves
    hands.ready(worker)
    assert (worker.has_served, worker.numbers.accepted) == (False, 0), "not before it is told to"
    worker.serve()
    assert (worker.has_served, worker.stage) == (True, Stage.SERVING)
    served, _ = hands.server.accept()
    client, server = hands.connect()
    assert worker.numbers == hands.workers.numbers == Numbers(2, 2, {})
    worker.show_live()
    wait_until(lambda: b"connection live" in hands.log.text, "it shows its connections")
    live = [line for line in hands.log.lines if line["message"] == "connection live"]
    assert {int(line["id"].split("-")[0], 16) for line in live} == {worker.pid}
    worker.leave(None, 0.0, None)
    assert worker.leaving and not worker.wanted
    hands.turn_until(lambda: worker.stage is Stage.LEFT, "it takes no more clients")
    client.sendall(b"still")
    assert loopback.read_exactly(server, 5) == b"still"
    for sock in (waiting, served, server):
        sock.close()
    assert loopback.read_to_end(client) == (b"", FIN)
    client.close()
    assert hands.ended(worker) == "exit 0"
    assert (len(hands.workers), hands.workers.deaths) == (0, 0)
    assert hands.workers.numbers.accepted == sum(hands.workers.numbers.closed.values()) == 2
    (record,) = hands.said.of("worker ended")
    assert fields(record) == {"pid": worker.pid, "how": "exit 0", "live": 0}
    assert record.levelname == "DEBUG"


def test_it_is_killed(hands: Hands) -> None:
    worker, other = hands.serving(2)
    peers = [hands.connect() for _ in range(4)]
    lost, kept = worker.numbers.live, other.numbers.live
    assert lost and kept and lost + kept == 4
    os.kill(worker.pid, signal.SIGKILL)
    assert hands.ended(worker) == "signal 9"
    (record,) = hands.said.of("worker ended")
    assert fields(record) == {"pid": worker.pid, "how": "signal 9", "live": lost}
    assert record.levelname == "ERROR"
    assert hands.workers.numbers == Numbers(4, kept, {"aborted": lost}), "nothing is forgotten"
    wait_until(lambda: sum(loopback.is_reset(client) for client, _ in peers) == lost, "its connections are reset")
    assert hands.workers.of(hands.generation) == [other]
    (again,) = hands.start()
    assert (again.slot, again.numbers) == (worker.slot, Numbers(0, 0, {}))


def test_those_that_are_not_needed_any_more(hands: Hands) -> None:
    workers = hands.start(2)
    hands.workers.dismiss(workers)
    assert [hands.ended(worker) for worker in workers] == ["signal 9"] * 2
    assert {record.levelname for record in hands.said.of("worker ended")} == {"DEBUG"}
    assert hands.workers.deaths == 0


def test_too_many(hands: Hands) -> None:
    for _ in range(SLOTS):
        hands.scoreboard.claim()
    with pytest.raises(SystemRefusedError, match="too many workers still finish their connections"):
        hands.start()
    hands.scoreboard.clear(5)
    (worker,) = hands.start()
    assert worker.slot == 5


# --- workers that stand still


def test_a_stalled_one_is_killed(hands: Hands) -> None:
    worker, other = hands.serving(2, stall_timeout=0.4)  # ten signs of life a second
    worker.stall_timeout = other.stall_timeout = 1
    os.kill(worker.pid, signal.SIGSTOP)
    wait_until(lambda: worker.silence > 1, "it is silent")
    hands.check(2)
    assert worker.stalled
    hands.check(2)
    assert hands.ended(worker) == "signal 9"
    (line,) = hands.logged("worker stalled")
    assert line["pid"] == worker.pid
    assert isinstance(line["seconds"], float) and 1 <= line["seconds"] < 2
    assert list(hands.workers) == [other]


def test_0_means_never(hands: Hands) -> None:
    (worker,) = hands.serving()
    worker.stall_timeout = 0
    wait_until(lambda: worker.silence > 0, "it is silent for longer than that")
    hands.check(2)
    hands.check(2)
    assert hands.logged("worker stalled") == []


def test_one_look_is_not_enough(hands: Hands) -> None:
    """It may have been stopped together with the supervisor, which was the first to go on."""
    (worker,) = hands.serving()
    longer, worker.stall_timeout = worker.stall_timeout, 1e-9
    hands.check(1)
    assert (worker.suspected, worker.stalled) == (True, False)
    worker.stall_timeout = longer
    wait_until(lambda: worker.silence < longer, "it has gone on")
    hands.check(2)
    assert not worker.suspected
    assert hands.logged("worker stalled") == []


def test_one_that_does_not_get_ready_is_killed(hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    (worker,) = hands.start(command=("sleep", "600"))
    worker.stall_timeout = 0.001
    wait_until(lambda: worker.silence > 0.001, "it is silent")
    hands.check(2)
    assert hands.logged("worker stalled") == [], "it may take its time"
    worker.stall_timeout = 0
    monkeypatch.setattr(workers, "BOOT_TIMEOUT", 0.001)
    hands.check(2)
    assert hands.ended(worker) == "signal 9"
    assert hands.logged("worker stalled")[0]["pid"] == worker.pid


def test_when_everything_stood_still_nobody_is_to_blame(hands: Hands) -> None:
    """A machine that was suspended, a debugger, Ctrl-Z: the check comes late."""
    (worker,) = hands.serving()
    os.kill(worker.pid, signal.SIGSTOP)
    worker.stall_timeout = 0.001
    wait_until(lambda: worker.silence > 0.001, "it is silent")
    hands.check(1, workers.LATE + 0.1)
    hands.check(int(workers.BOOT_TIMEOUT / workers.CHECK_INTERVAL) - 1)
    assert hands.logged("worker stalled") == [] and not worker.suspected
    hands.check(2)
    assert hands.ended(worker) == "signal 9"


def test_only_listeners_that_are_gone_take_a_grace(hands: Hands) -> None:
    ours = hands.generation.listeners
    assert last_clients(ours) == ([ours[0].name], HANDSHAKE_GRACE)
    assert last_clients([]) == ([], 0.0)


# --- numbers


some_numbers = st.builds(
    Numbers,
    st.integers(0, 9),
    st.integers(0, 9),
    st.dictionaries(st.sampled_from([outcome.value for outcome in Outcome]), st.integers(1, 9)),
)


@given(st.lists(some_numbers, max_size=5))
def test_numbers_are_added(several: list[Numbers]) -> None:
    total = sum(several, NO_NUMBERS)
    assert total.accepted == sum(one.accepted for one in several)
    assert total.live == sum(one.live for one in several)
    for outcome in Outcome:
        assert total.closed.get(outcome.value, 0) == sum(one.closed.get(outcome.value, 0) for one in several)
    json.dumps(total._asdict())


@given(some_numbers)
def test_what_a_dead_worker_had_is_closed(numbers: Numbers) -> None:
    lost = with_lost(numbers)
    assert (lost.accepted, lost.live) == (numbers.accepted, 0)
    assert sum(lost.closed.values()) == sum(numbers.closed.values()) + numbers.live
    assert lost.closed.get("aborted", 0) == numbers.closed.get("aborted", 0) + numbers.live
    assert 0 not in lost.closed.values()


# --- where they run


ALL = os.sched_getaffinity(0)


HOMES = tuple(sorted(ALL))


def test_each_processor_has_as_many_as_the_others(hands: Hands) -> None:
    workers = hands.start(2 * len(HOMES), cpus=HOMES)
    assert sorted(str(worker.cpu) for worker in workers) == sorted([*map(str, HOMES)] * 2)
    hands.turn_until(lambda: all(worker.stage is Stage.READY for worker in workers), "they are ready")
    for worker in workers:
        assert {(frozenset(where), how) for where, how in hands.threads(worker)} == {
            (frozenset({worker.cpu}), os.SCHED_OTHER)
        }
    dead = workers[len(HOMES) // 2]
    dead.kill()
    hands.ended(dead)
    (another,) = hands.start(1, cpus=HOMES)
    assert another.cpu == dead.cpu
