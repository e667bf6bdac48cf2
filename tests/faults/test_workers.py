"""A worker dies, stalls, or dies again and again, or the supervisor dies: who notices, and who does not.

Also what all workers have in common: the limits hold for the relay and not for each of them, and none of them gets
much more than its share. The id of a connection begins with the process id of its worker, in hex.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime

import pytest
from deadlines import wait_until
from pairs import PATIENCE, Pair, Pairs, Rhythm
from rows import Seen

from tproxy_relay.lab import Lab, Line, RelayProcess

pytestmark = pytest.mark.slow

PORT = 8000
FOUR = ("--workers", "4")
INTERCEPT = ("--intercept-inbound", str(PORT))
REPLACED = 1.0
"""Seconds until the successor of a worker that has died serves its first client."""
UNNOTICED = 0.5
"""Seconds that a new client may have to wait at most when one of the workers stands still."""
UNFAIR = 1.5
"""Times the mean: more connections than that no worker must have."""
STALL_TIMEOUT = 2.0

LOOKS = (
    ("nft", "-s", "list", "ruleset"),
    *(("ip", family, "rule") for family in ("-4", "-6")),
    *(("ip", family, "route", "show", "table", "all") for family in ("-4", "-6")),
)


@pytest.fixture
def steered(lab: Lab) -> Iterator[Lab]:
    """A lab with rules that nobody holds."""
    lab.intercept((PORT,))
    yield lab
    lab.stop_intercepting()


# --- what the tests look at


def look(lab: Lab) -> str:
    """All rules and routes of the relay's host."""
    return "\n".join(lab.relay.run(argv).stdout for argv in LOOKS)


def said(relay: RelayProcess, message: str) -> list[Line]:
    """The lines with that message, so far."""
    return [line for line in relay.lines() if line.get("message") == message]


def worker_of(line: Line) -> int:
    """The worker that has, or had, this connection."""
    return int(line["id"].partition("-")[0], 16)


def by_worker(lab: Lab, relay: RelayProcess, pairs: Iterable[Pair]) -> dict[int, list[Pair]]:
    """Which worker has which of them. That each was intercepted is what this proves, too."""
    names = {pair.name: pair for pair in pairs}
    lines: list[Line] = []

    def all_there() -> bool:
        lines[:] = [line for line in said(relay, "connection open") if line["client"] in names]
        return len(lines) >= len(names)

    wait_until(all_there, "the line of each connection in the log")
    assert {line["orig_dst"] for line in lines} == {f"{lab.server.ipv4}:{PORT}"}
    found: dict[int, list[Pair]] = {pid: [] for pid in relay.workers}
    for line in lines:
        found.setdefault(worker_of(line), []).append(names[line["client"]])
    return found


def outcomes(relay: RelayProcess, pairs: Iterable[Pair]) -> Counter[str]:
    """How those ended, as soon as the relay has told of all of them."""
    names = {pair.name for pair in pairs}
    found: dict[str, str] = {}

    def all_there() -> bool:
        found.update({record["client"]: record["outcome"] for record in relay.records() if record["client"] in names})
        return len(found) == len(names)

    wait_until(all_there, "the record of each connection")
    return Counter(found.values())


def first_client_of_another(lab: Lab, relay: RelayProcess, pairs: Pairs, known: Iterable[int]) -> int:
    """Clients come until a worker has one that is none of these. Its process id."""
    before = set(known)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        owners = {pid for pid, has in by_worker(lab, relay, pairs.open_served()).items() if has}
        if owners - before:
            return owners.pop()
    raise AssertionError(f"no new worker serves within {PATIENCE:g} s")


def live_as_told(relay: RelayProcess) -> int:
    """How many connections the relay says that it has."""
    before = len(said(relay, "connections"))
    relay.signal(signal.SIGUSR1)
    wait_until(lambda: len(said(relay, "connections")) > before, "its own count")
    return int(said(relay, "connections")[-1]["live"])


def attempt(lab: Lab) -> str:
    """What a new client meets; `direct`, if the server sees the client itself."""
    try:
        with lab.server.listen(PORT) as listener, lab.client.connect(lab.server.ipv4, PORT, 3):
            listener.settimeout(3)
            accepted, peer = listener.accept()
            accepted.close()
            return "direct" if peer[0] == lab.client.ipv4 else "relayed"
    except OSError as error:
        return type(error).__name__


@contextlib.contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """SIGSTOP them, SIGCONT those that still live."""
    halted = list(pids)
    for pid in halted:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in halted:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def gone_within(pids: Iterable[int], patience: float) -> float:
    """Wait for the end of processes that are not ours. The seconds until the last one."""
    began = time.monotonic()
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue  # gone, and somebody has waited for it
        ended, _, _ = select.select([fd], [], [], max(0.0, began + patience - time.monotonic()))
        os.close(fd)
        assert ended, f"a process is still there after {patience:g} s"
    return time.monotonic() - began


# --- one worker dies


@pytest.mark.row("H4", "a worker of four is killed", "replaced within 1 s; others untouched")
def test_a_killed_worker_takes_only_its_own_connections_with_it(steered: Lab, seen: Seen) -> None:
    lab = steered
    with lab.relay_process(*FOUR) as relay, Pairs(lab, PORT, pause=0.6) as pairs:
        everybody = pairs.open_served(500)
        owners = by_worker(lab, relay, everybody)
        assert len(owners) == 4
        victim = max(owners, key=lambda pid: len(owners[pid]))
        lost = owners.pop(victim)
        rest = [pair for has in owners.values() for pair in has]
        pairs.go_on(everybody, 1)

        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        successor = first_client_of_another(lab, relay, pairs, [victim, *owners])
        replaced = time.monotonic() - killed
        pairs.all_reset(lost)
        pairs.go_on(rest)
        print(f"{len(lost)} lost, {len(rest)} go on; the successor serves after {replaced:.2f} s")
        assert replaced < REPLACED

        line = relay.wait_for_line(lambda line: line["message"] == "worker ended")
        assert (line["pid"], line["how"], line["live"]) == (victim, "signal 9", len(lost))
        assert sorted(relay.workers) == sorted([successor, *owners])
        going = [pair for pair in pairs.all if pair.flows]
        assert len(going) == len(pairs.all) - len(lost)
        pairs.finish(going)
        assert outcomes(relay, going) == {"completed": len(going)}
        relay.stop()
        told = said(relay, "stopped")[0]
        assert told["accepted"] == len(pairs.all)
        assert told["closed"] == {"aborted": len(lost), "completed": len(going)}
    seen("replaced; the others go on")


def test_clients_in_the_backlog_are_served_when_a_worker_dies(steered: Lab) -> None:
    """Nobody accepts when they come, and one of the workers never will."""
    lab = steered
    with lab.relay_process(*FOUR) as relay, Pairs(lab, PORT) as pairs:
        owners = by_worker(lab, relay, pairs.open_served(12))
        victim = next(pid for pid in owners if owners[pid])
        with stopped(relay.workers):
            waiting = pairs.open(40)
            pairs.wait(lambda: all(pair.name for pair in waiting), "the kernel has made the connections")
            assert not any(pair.served for pair in waiting)
            os.kill(victim, signal.SIGKILL)
            pairs.all_reset(owners.pop(victim))
            assert not any(pair.served or pair.client_saw for pair in waiting)
        pairs.wait(lambda: all(pair.flows for pair in waiting), "those that waited are served")
        assert victim not in {pid for pid, has in by_worker(lab, relay, waiting).items() if has}
        pairs.go_on([pair for has in owners.values() for pair in has])
        pairs.finish(waiting)
        assert outcomes(relay, waiting) == {"completed": 40}


# --- the supervisor dies


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.row("H5", "the supervisor is killed", "workers gone within 1 s; the next one binds at once")
def test_a_killed_supervisor_leaves_nothing_in_the_way_of_the_next_one(
    fresh_lab: Lab, on_failure: str, seen: Seen
) -> None:
    lab, before = fresh_lab, look(fresh_lab)
    options = (*FOUR, *INTERCEPT, "--on-failure", on_failure)
    with lab.relay_process(*options) as relay:
        with Pairs(lab, PORT) as pairs:
            carried = pairs.open_served(40)
            assert len(by_worker(lab, relay, carried)) == 4
            kill_supervisor(relay, pairs, carried)
        if on_failure == "open":
            wait_until(lambda: look(lab) == before, "the rules are gone", 2)
            assert attempt(lab) == "direct"
        else:
            wait_until(lambda: attempt(lab) == "ConnectionRefusedError", "new ones are refused", 2)
        assert said(relay, "worker ended") == []

    with lab.relay_process(*options) as second, Pairs(lab, PORT) as pairs:
        carried = pairs.open_served(40)
        assert len(by_worker(lab, second, carried)) == 4
        kill_supervisor(second, pairs, carried)
        with lab.relay_process(*options) as third:  # without a look at what the second has left behind
            fresh = pairs.open_served(40)
            assert len(by_worker(lab, third, fresh)) == 4
            pairs.finish(fresh)
            third.stop()
    assert look(lab) == before
    seen("gone; bound at once")


def kill_supervisor(relay: RelayProcess, pairs: Pairs, carried: list[Pair]) -> None:
    """All its workers end, and all its connections, by resets."""
    workers = relay.workers
    os.kill(relay.pid, signal.SIGKILL)
    gone = gone_within(workers, 1.0)
    pairs.all_reset(carried)
    print(f"all workers gone after {gone:.3f} s")


# --- worker after worker dies


def moment(line: Line) -> datetime:
    return datetime.fromisoformat(line["timestamp"])


def test_four_deaths_are_made_good_after_growing_pauses(steered: Lab) -> None:
    """Two of them hit workers that have served, two hit them while they start."""
    lab = steered
    with lab.relay_process(*FOUR) as relay, Pairs(lab, PORT) as pairs:
        owners = by_worker(lab, relay, pairs.open_served(40))
        first = relay.workers
        os.kill(first[0], signal.SIGKILL)
        pairs.all_reset(owners.pop(first[0]))
        os.kill(first_client_of_another(lab, relay, pairs, first), signal.SIGKILL)
        for deaths in (2, 3):
            wait_until(lambda: len(said(relay, "worker started")) == 4 + deaths, f"replaced after {deaths} deaths")
            os.kill(relay.workers[-1], signal.SIGKILL)
        wait_until(lambda: len(said(relay, "worker started")) == 8, "replaced after 4 deaths")
        pauses = [
            (moment(started) - moment(ended)).total_seconds()
            for ended, started in zip(said(relay, "worker ended"), said(relay, "worker started")[4:])
        ]
        print(f"pauses: {pauses}")
        assert len(pauses) == 4
        assert all(least <= pause < least + 0.4 for pause, least in zip(pauses, (0.0, 0.1, 0.2, 0.4)))

        last = first_client_of_another(
            lab, relay, pairs, {line["pid"] for line in said(relay, "worker ended")} | {*first}
        )
        assert sorted(relay.workers) == sorted([*first[1:], last])
        pairs.go_on([pair for has in owners.values() for pair in has])
        pairs.finish([pair for pair in pairs.all if pair.flows])
        relay.stop()


@pytest.mark.parametrize("on_failure", ["open", "closed"])
@pytest.mark.row("H4", "five workers die within a minute", "the relay ends, exit code 1")
def test_five_deaths_within_a_minute_end_the_relay_in_good_order(fresh_lab: Lab, on_failure: str, seen: Seen) -> None:
    lab, before = fresh_lab, look(fresh_lab)
    options = (*FOUR, *INTERCEPT, "--on-failure", on_failure)
    met = {"open": "direct", "closed": "ConnectionRefusedError"}[on_failure]
    with lab.relay_process(*options, "--drain-timeout", "30") as relay, Pairs(lab, PORT) as pairs:
        assert look(lab) != before
        survivors = five_deaths(lab, relay, pairs)
        pairs.go_on(survivors)
        assert newcomer(pairs) == met, "while the last connections are finished"
        pairs.go_on(survivors)
        assert relay.returncode is None
        pairs.finish(survivors)
        assert relay.wait() == 1
        assert outcomes(relay, survivors) == {"completed": len(survivors)}
    assert attempt(lab) == met
    if on_failure == "closed":
        lab.relay.run([sys.executable, "-m", "tproxy_relay", "rules", "remove", "--config", os.devnull, *INTERCEPT])
    assert look(lab) == before
    assert attempt(lab) == "direct"
    seen("ends in good order, 1")


@pytest.mark.parametrize("on_failure", ["open", "closed"])
def test_after_five_deaths_the_drain_timeout_holds(fresh_lab: Lab, on_failure: str) -> None:
    lab, before = fresh_lab, look(fresh_lab)
    options = (*FOUR, *INTERCEPT, "--on-failure", on_failure)
    with lab.relay_process(*options, "--drain-timeout", "1.5") as relay, Pairs(lab, PORT) as pairs:
        survivors = five_deaths(lab, relay, pairs)
        draining = said(relay, "draining")[0]
        assert (draining["live"], draining["drain_timeout"]) == (len(survivors), 1.5)
        pairs.go_on(survivors, 1)
        pairs.all_reset(survivors)
        assert relay.wait() == 1
        assert outcomes(relay, survivors) == {"drained": len(survivors)}
        seconds = (moment(said(relay, "stopped")[0]) - moment(draining)).total_seconds()
        assert 1.5 <= seconds < 4.5  # and some for clients whose handshake was under way
    with lab.relay_process(*options) as successor:  # whatever was left behind
        with Pairs(lab, PORT) as pairs:
            by_worker(lab, successor, pairs.open_served(4))
        successor.stop()
    assert look(lab) == before


def five_deaths(lab: Lab, relay: RelayProcess, pairs: Pairs) -> list[Pair]:
    """Kill one worker, and then each one that takes its place. The connections of the others."""
    owners = by_worker(lab, relay, pairs.open_served(40))
    victim = max(owners, key=lambda pid: len(owners[pid]))
    for deaths in range(1, 6):
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: len(said(relay, "worker ended")) == deaths, f"{deaths} deaths")
        if deaths < 5:
            known = {line["pid"] for line in said(relay, "worker ended")} | set(owners)
            victim = first_client_of_another(lab, relay, pairs, known)
    told = relay.wait_for_line(lambda line: line["message"] == "workers die again and again, stopping")
    assert told["levelname"] == "CRITICAL"
    relay.wait_for_line(lambda line: line["message"] == "draining")
    dead = {line["pid"] for line in said(relay, "worker ended")}
    left = [pair for pid, has in by_worker(lab, relay, pairs.all).items() if pid not in dead for pair in has]
    lost = [pair for pair in pairs.all if pair not in left]
    assert len(left) >= 20 and len(lost) >= 10 + 4
    pairs.all_reset(lost)
    assert len(said(relay, "worker started")) == 8, "it has not given up"
    return left


def newcomer(pairs: Pairs) -> str:
    """What a new client meets."""
    [pair] = pairs.open()
    pairs.wait(lambda: pair.served or pair.client_saw is not None, "an answer")
    if not pair.served:
        return "ConnectionRefusedError" if pair.client_saw == "ECONNREFUSED" else str(pair.client_saw)
    assert pair.server is not None
    return "direct" if pair.server.getpeername() == pair.client.getsockname() else "relayed"


# --- limits


def test_max_connections_holds_for_the_whole_relay(steered: Lab) -> None:
    lab = steered
    with lab.relay_process(*FOUR, "--max-connections", "100") as relay, Pairs(lab, PORT) as pairs:
        crowd = pairs.open(150)
        took = pairs.wait(lambda: served(crowd) >= 100, "the first 100")
        check_full(relay, pairs, crowd, 100)
        owners = by_worker(lab, relay, [pair for pair in crowd if pair.served])
        print(f"100 after {took:.2f} s: {[len(has) for has in owners.values()]}")
        assert "max-connections" in {line["reason"] for line in said(relay, "not accepting")}

        # Some leave, and so many others get their turn.
        leaving = [pair for pair in crowd if pair.served][:20]
        pairs.finish(leaving)
        took = pairs.wait(lambda: served(crowd) >= 120, "20 more")
        check_full(relay, pairs, crowd, 120)
        print(f"20 more after {took:.2f} s")

        # A worker dies: its share comes back, although nobody could give it back.
        owners = by_worker(lab, relay, [pair for pair in crowd if pair.flows])
        victim = max(owners, key=lambda pid: len(owners[pid]))
        lost = owners[victim]
        os.kill(victim, signal.SIGKILL)
        pairs.all_reset(lost)
        took = pairs.wait(lambda: served(crowd) == min(150, 120 + len(lost)), "those that take the places of the lost")
        print(f"{len(lost)} more after {took:.2f} s")
        fresh = pairs.open(20)  # more than there is room for, whatever the number of the lost was
        everybody = crowd + fresh
        expected = min(170, 120 + len(lost))
        pairs.wait(lambda: served(everybody) >= expected, "all places are taken again")
        check_full(relay, pairs, everybody, expected)

        while going := [pair for pair in everybody if pair.flows]:
            pairs.finish(going)
            if any(pair.client_saw is None for pair in everybody):
                pairs.wait(lambda: any(pair.flows for pair in everybody), "the next ones")
        assert all(pair.served for pair in everybody), "all have had their turn"
        assert pairs.most_at_server == 100
        assert outcomes(relay, [pair for pair in everybody if pair not in lost]) == {"completed": 170 - len(lost)}
        assert live_as_told(relay) == 0
        relay.stop()


def served(pairs: Iterable[Pair]) -> int:
    return sum(pair.served for pair in pairs)


def check_full(relay: RelayProcess, pairs: Pairs, clients: list[Pair], expected: int) -> None:
    """So many of them have been served in all, as many as there may be are here, and the others just wait."""
    deadline = time.monotonic() + 0.7
    while time.monotonic() < deadline:
        pairs.go_on([pair for pair in clients if pair.flows], 1)
        assert served(clients) == expected
        assert pairs.live_at_server == 100, "exactly so many at once"
        assert not any(pair.client_saw for pair in clients if not pair.served), "who waits is not turned away"
    assert pairs.most_at_server == 100, "never more"
    assert live_as_told(relay) == 100


def test_max_per_source_holds_across_the_workers(fresh_lab: Lab) -> None:
    lab = fresh_lab
    lab.intercept((PORT,))
    other = "10.81.1.3"
    lab.client.run(["ip", "addr", "add", f"{other}/24", "dev", "cr"])
    with lab.relay_process(*FOUR, "--max-per-source", "50") as relay, Pairs(lab, PORT) as pairs:
        live = so_many_of(pairs, lab.client.ipv4, come=80, stay=50)
        beside = so_many_of(pairs, other, come=45, stay=45)
        owners = by_worker(lab, relay, live)
        assert sum(bool(has) for has in owners.values()) > 1
        assert Counter(record["outcome"] for record in relay.records()) == {"over-limit": 30}
        assert all(record["client"].startswith(f"{lab.client.ipv4}:") for record in relay.records())

        # It leaves, and may come again.
        pairs.finish(live)
        assert outcomes(relay, live) == {"completed": 50}
        live = so_many_of(pairs, lab.client.ipv4, come=60, stay=50)

        # A worker dies: its clients may come again.
        owners = by_worker(lab, relay, live + beside)
        victim = max(owners, key=lambda pid: len(owners[pid]))
        lost = owners[victim]
        os.kill(victim, signal.SIGKILL)
        pairs.all_reset(lost)
        relay.wait_for_line(lambda line: line["message"] == "worker ended")
        room = len(set(lost) & set(live))
        print(f"room for {room} again")
        assert room > 0
        live += so_many_of(pairs, lab.client.ipv4, come=room + 10, stay=room)
        room = len(set(lost) & set(beside)) + 5
        beside += so_many_of(pairs, other, come=room + 10, stay=room)
        going = [pair for pair in live + beside if pair not in lost]
        pairs.go_on(going)
        assert len(going) == 100
        assert all(pair.flows for pair in going)
        refused = sum(record["outcome"] == "over-limit" for record in relay.records())
        assert refused == 30 + 10 + 10 + 10


def so_many_of(pairs: Pairs, source: str, *, come: int, stay: int) -> list[Pair]:
    """So many clients come from there at once, so many stay, and the others are reset."""
    fresh = pairs.open(come, source=source)
    pairs.wait(lambda: all(pair.served or pair.client_saw for pair in fresh), "what becomes of them")
    live = [pair for pair in fresh if pair.flows]
    assert len(live) == stay, pairs.summary()
    assert {pair.client_saw for pair in fresh if pair not in live} <= {"ECONNRESET"}
    pairs.go_on(live)
    return live


# --- a worker stands still


def test_a_stalled_worker_is_replaced_and_meanwhile_nobody_waits(steered: Lab) -> None:
    lab = steered
    stall = ("--stall-timeout", f"{STALL_TIMEOUT:g}")
    with lab.relay_process(*FOUR, *stall) as relay, Pairs(lab, PORT) as pairs:
        everybody = pairs.open_served(40)
        owners = by_worker(lab, relay, everybody)
        victim = next(iter(owners))
        lost = owners.pop(victim)
        rest = [pair for has in owners.values() for pair in has]
        with stopped([victim]), Rhythm(pairs, 0.05) as rhythm:
            halted = time.monotonic()
            line = relay.wait_for_line(lambda line: line["message"] == "worker stalled")
            seconds = time.monotonic() - halted
            pairs.all_reset(lost)
            wait_until(lambda: said(relay, "worker ended"), "it has ended")
        assert line["pid"] == victim and line["seconds"] >= STALL_TIMEOUT
        assert STALL_TIMEOUT - 0.6 < seconds < STALL_TIMEOUT + 2.5, "it is looked for once a second"
        pairs.go_on(rest)
        late = waited(pairs, rhythm.opened)
        print(f"stalled after {seconds:.2f} s; {len(rhythm.opened)} clients came, the slowest waited {late:.3f} s")
        assert late < UNNOTICED
        assert all(pair.flows for pair in rhythm.opened)
        successor = first_client_of_another(lab, relay, pairs, [victim, *owners])
        assert sorted(relay.workers) == sorted([successor, *owners])
        assert len(said(relay, "worker stalled")) == 1
        pairs.finish([pair for pair in pairs.all if pair.flows])
        relay.stop()


def waited(pairs: Pairs, clients: list[Pair]) -> float:
    """Seconds that the one who waited longest had to wait to be served."""
    pairs.wait(lambda: all(pair.waited is not None for pair in clients), "all are served")
    return max(pair.waited or 0.0 for pair in clients)


def test_a_lonely_client_does_not_wait_for_a_worker_that_stands_still(steered: Lab) -> None:
    """The kernel wakes one worker for a client, and that one may be stopped in the same moment. Then nobody else hears
    of the client until another one comes. It happens about every tenth time."""
    lab = steered
    with lab.relay_process(*FOUR) as relay, Pairs(lab, PORT) as pairs:
        pairs.open_served(4)
        delays = [wait_beside(victim, pairs) for _ in range(10) for victim in relay.workers]
        print(f"the slowest of {len(delays)} waited {max(delays):.3f} s")
        assert max(delays) < UNNOTICED, f"{sum(delay >= UNNOTICED for delay in delays)} waited so long"
        by_worker(lab, relay, pairs.all)


def wait_beside(victim: int, pairs: Pairs) -> float:
    """Seconds that a client waits who comes when this worker is stopped; at most a little more than allowed."""
    try:
        [lonely] = pairs.open(before=lambda: os.kill(victim, signal.SIGSTOP))
        with contextlib.suppress(AssertionError):
            pairs.wait(lambda: lonely.served, "it is served", UNNOTICED)
    finally:
        os.kill(victim, signal.SIGCONT)
    pairs.wait(lambda: lonely.served, "it is served when the worker goes on")
    pairs.finish([lonely])
    assert lonely.waited is not None
    return lonely.waited


def test_a_short_stop_of_a_worker_changes_nothing(steered: Lab) -> None:
    lab = steered
    stall = ("--stall-timeout", f"{STALL_TIMEOUT:g}")
    with lab.relay_process(*FOUR, *stall) as relay, Pairs(lab, PORT) as pairs:
        everybody = pairs.open_served(40)
        workers = list(by_worker(lab, relay, everybody))
        with stopped(workers[:1]):
            nothing_for(1.0, relay, workers)
        nothing_for(STALL_TIMEOUT, relay, workers)
        pairs.go_on(everybody)
        pairs.finish(everybody)
        relay.stop()


def test_a_relay_that_stood_still_as_a_whole_kills_nobody(steered: Lab) -> None:
    """The host slept, or somebody froze the control group."""
    lab = steered
    stall = ("--stall-timeout", f"{STALL_TIMEOUT:g}")
    with lab.relay_process(*FOUR, *stall) as relay, Pairs(lab, PORT) as pairs:
        everybody = pairs.open_served(40)
        workers = list(by_worker(lab, relay, everybody))
        for order in ([relay.pid, *workers], [*workers, relay.pid]):
            with stopped(order):
                nothing_for(STALL_TIMEOUT + 1, relay, workers)
            pairs.go_on(everybody)
            nothing_for(STALL_TIMEOUT + 1, relay, workers)
            pairs.go_on(everybody)
        pairs.finish(everybody)
        relay.stop()


def test_a_relay_that_stood_still_for_a_moment_kills_nobody(steered: Lab) -> None:
    """A little longer than a small limit, between two looks of the supervisor, which is the first to go on."""
    lab = steered
    for phase in (0.2, 0.45, 0.7):  # of the second that lies between two looks
        with lab.relay_process(*FOUR, "--stall-timeout", "1") as relay, Pairs(lab, PORT) as pairs:
            began = time.monotonic()
            everybody = pairs.open_served(8)
            workers = relay.workers
            nothing_for(began + phase - time.monotonic(), relay, workers)
            with stopped([relay.pid, *workers]):
                nothing_for(1.2, relay, workers)
            nothing_for(1.5, relay, workers)
            pairs.go_on(everybody)


def nothing_for(seconds: float, relay: RelayProcess, workers: list[int]) -> None:
    """So long no worker goes, and none comes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert relay.workers == workers
        assert said(relay, "worker stalled") == []
        select.select([], [], [], 0.05)


# --- each has its share


@pytest.mark.alone  # beside others, it is the machine that shares
@pytest.mark.parametrize("how", ["one by one", "at once"])
def test_no_worker_has_much_more_than_its_share(steered: Lab, how: str) -> None:
    lab, count = steered, 400
    with lab.relay_process(*FOUR) as relay, Pairs(lab, PORT, pause=2.0) as pairs:
        if how == "at once":
            everybody = pairs.open_served(count)
        else:
            everybody = [pair for _ in range(count) for pair in pairs.open_served()]
        shares = [len(has) for has in by_worker(lab, relay, everybody).values()]
        print(f"shares: {shares}")
        assert sum(shares) == count
        assert len(shares) == 4
        assert max(shares) <= UNFAIR * count / 4
        pairs.finish(everybody)
