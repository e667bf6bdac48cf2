"""The ruleset cannot outlive the relay, and the relay does not lose it: death of either, flushes, foreign hands."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
from deadlines import wait_until
from interception import (
    BACKENDS,
    BOTH_WAYS,
    FAMILIES,
    PORT,
    attempt,
    echo_servers,
    furnish,
    look,
    opened,
    ping,
    processes,
    ways,
)
from rows import Seen

from tproxy_relay.lab import Lab, LabError, RelayProcess

GONE_DIRECT = {"nft": 0.1, "iptables-nft": 1.0, "iptables-legacy": 1.0}
"""Seconds after kill -9 until new connections go direct."""
REFUSED = 0.05
"""Seconds that a refusal takes, with `on-failure closed`."""
RESTORED = 5.0
"""Seconds until rules that somebody took away are back."""


@pytest.fixture
def furnished(fresh_lab: Lab) -> Iterator[Lab]:
    """A lab whose relay host has rules of others; afterwards they are all still there."""
    furnish(fresh_lab)
    before = look(fresh_lab)
    yield fresh_lab
    assert look(fresh_lab) == before


def all_ways(lab: Lab) -> list[tuple[str, str]]:
    """Way and family of each new connection that fails, and how."""
    return [
        (f"{way}/{name}", fault)
        for way, (source, destination) in ways(lab).items()
        for name, family in FAMILIES.items()
        if (fault := attempt(source, destination, family))
    ]


def check_intercepted(lab: Lab, relay: RelayProcess, total: int) -> None:
    """All six ways work, and lead through the relay, which has taken so many connections by then."""
    assert all_ways(lab) == []
    wait_until(lambda: opened(relay) == total, f"{total} connections through the relay")


def some_backends(quick: str = "nft") -> list[object]:
    return [pytest.param(name, marks=[] if name == quick else pytest.mark.slow) for name in BACKENDS]


# --- the relay dies ---


@pytest.mark.parametrize("mode", ["tproxy", pytest.param("redirect", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", some_backends())
@pytest.mark.row("H8", "all killed, on-failure open", "new connections go direct; nothing is left")
def test_killed_and_open_all_goes_direct_and_nothing_is_left(
    furnished: Lab, backend: str, mode: str, seen: Seen
) -> None:
    lab, before = furnished, look(furnished)
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--backend", backend, "--mode", mode) as relay:
        with lab.client.connect(lab.server.ipv4, PORT) as carried:
            assert ping(carried) == ""
            check_intercepted(lab, relay, 7)
            relay.kill()
            killed = time.monotonic()
            assert "ConnectionResetError" in ping(carried), "a relayed connection ends by a reset"
            time.sleep(max(0.0, killed + GONE_DIRECT[backend] - time.monotonic()))
            assert all_ways(lab) == [], "by now all new ones go direct"
            wait_until(lambda: look(lab) == before, "everything is as before", 2)
    seen("direct; nothing left")


@pytest.mark.parametrize("mode", ["tproxy", pytest.param("redirect", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", some_backends())
@pytest.mark.row("H8", "all killed, on-failure closed", "new connections refused at once")
def test_killed_and_closed_all_is_refused_at_once(
    furnished: Lab, backend: str, mode: str, rules: Callable[..., str], seen: Seen
) -> None:
    lab, before = furnished, look(furnished)
    options = (*BOTH_WAYS, "--backend", backend, "--mode", mode, "--on-failure", "closed")
    with echo_servers(lab):
        with lab.relay_process(*options) as relay:
            check_intercepted(lab, relay, 6)
            relay.kill()
            wait_until(lambda: not processes(lab, "-m tproxy_relay.guard"), "the guard has done its work")
        for way, (source, destination) in ways(lab).items():
            for name, family in FAMILIES.items():
                assert refusal(lambda: attempt(source, destination, family)) < REFUSED, f"{way}, {name}"
        with lab.relay_process(*options) as relay:
            check_intercepted(lab, relay, 6)
            relay.kill()
            wait_until(lambda: not processes(lab, "-m tproxy_relay.guard"), "the guard has done its work")
        rules(lab, "remove")
        assert all_ways(lab) == []
        assert look(lab) == before
    seen("refused at once")


def refusal(connect: Callable[[], str]) -> float:
    """Seconds of the quickest of five; each must be refused."""
    times = []
    for _ in range(5):
        began = time.monotonic()
        assert connect() == "ConnectionRefusedError"
        times.append(time.monotonic() - began)
    return min(times)


def test_everything_killed_nft_rules_are_gone_and_the_rest_harms_nobody(
    furnished: Lab, rules: Callable[..., str]
) -> None:
    lab, before = furnished, look(furnished)
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS) as relay:
        check_intercepted(lab, relay, 6)
        everything = [relay.pid, *processes(lab, "-m tproxy_relay.guard"), *processes(lab, "nft -i")]
        assert len(everything) == 3
        for pid in everything:
            os.kill(pid, signal.SIGKILL)
        time.sleep(GONE_DIRECT["nft"])
        assert all_ways(lab) == []
        left = set(look(lab).splitlines()) - set(before.splitlines())
        assert left and all("206" in line for line in left), "rules of routing that match nothing, and a route"
        assert "removed" in rules(lab, "remove")
        assert look(lab) == before


@pytest.mark.slow
def test_killed_while_draining_nothing_is_left_even_with_closed(furnished: Lab) -> None:
    lab, before = furnished, look(furnished)
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--on-failure", "closed") as relay:
        with lab.client.connect(lab.server.ipv4, PORT) as carried:
            assert ping(carried) == ""
            relay.signal(signal.SIGTERM)
            relay.wait_for_line(lambda line: line["message"] == "draining")
            relay.kill()
            wait_until(lambda: look(lab) == before, "it was told to stop, so it has not failed")
        assert all_ways(lab) == []


# --- the guard dies ---


@pytest.mark.parametrize("victim", ["-m tproxy_relay.guard", "nft -i"])
def test_a_killed_guard_is_replaced(furnished: Lab, victim: str) -> None:
    """Without rules for a moment, a relayed connection that is silent does not notice."""
    lab = furnished
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS) as relay:
        with lab.client.connect(lab.server.ipv4, PORT) as carried:
            assert ping(carried) == ""
            rules = look(lab)
            wait_until(lambda: "unacked" not in lab.relay.run(["ss", "-tin"]).stdout, "no packet is on its way")
            for pid in processes(lab, victim):
                os.kill(pid, signal.SIGKILL)
            relay.wait_for_line(lambda line: line["message"] == "ruleset restored")
            assert ping(carried) == "", "what is relayed goes on"
            assert look(lab) == rules
        check_intercepted(lab, relay, 7)
        relay.stop()


@pytest.mark.slow
def test_a_stop_beside_the_guards_death_still_stops_and_cleans_up(furnished: Lab) -> None:
    lab, before = furnished, look(furnished)
    for pause in (0.0, 0.02, 0.2):
        with lab.relay_process(*BOTH_WAYS) as relay:
            [guard] = processes(lab, "-m tproxy_relay.guard")
            os.kill(guard, signal.SIGKILL)
            time.sleep(pause)
            relay.signal(signal.SIGTERM)
            relay.wait_for_line(lambda line: line["message"] == "ruleset removed")
        wait_until(lambda: look(lab) == before, f"all gone, with {pause} s between")


@pytest.mark.slow
def test_signals_for_the_whole_group_do_not_end_the_guard(furnished: Lab) -> None:
    lab = furnished
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS) as relay:
        [guard] = processes(lab, "-m tproxy_relay.guard")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(guard, number)
        check_intercepted(lab, relay, 6)
        assert processes(lab, "-m tproxy_relay.guard") == [guard]
        relay.stop()


# --- somebody changes rules ---

INTERFERENCE = {
    "nft": ["ip rule del pref 7007", "ip -6 route flush table 7006", "ip link set lo down; ip link set lo up"],
    "iptables-nft": ["iptables-nft -t mangle -F TPROXY_RELAY_OUT", "ip rule del pref 7008", "nft flush ruleset"],
    "iptables-legacy": [
        "iptables-legacy -t mangle -F PREROUTING",
        "ip6tables-legacy -t mangle -F",
        "ip route flush table 7006",
    ],
}


@pytest.mark.parametrize("backend", some_backends())
@pytest.mark.row("H11", "the ruleset is flushed under a live relay", "put back, one warning")
@pytest.mark.slow
def test_what_somebody_takes_away_comes_back_with_one_warning_each(fresh_lab: Lab, backend: str, seen: Seen) -> None:
    lab = fresh_lab
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS, "--backend", backend) as relay:
        rules = sorted(look(lab).splitlines())  # tables that were flushed come back in another order
        for number, command in enumerate(INTERFERENCE[backend], 1):
            lab.relay.run(["sh", "-c", command])
            assert sorted(look(lab).splitlines()) != rules, command
            wait_until(lambda: sorted(look(lab).splitlines()) == rules, f"restored after {command}", RESTORED)
            wait_until(lambda: restored(relay) == number, f"the warning after {command}")
        check_intercepted(lab, relay, 6)
        assert restored(relay) == len(INTERFERENCE[backend])
        relay.stop()
    seen("put back, one warning")


def restored(relay: RelayProcess) -> int:
    return sum(line["message"] == "ruleset restored" for line in relay.lines())


def test_a_held_table_is_immune_to_a_flush(fresh_lab: Lab) -> None:
    lab = fresh_lab
    furnish(lab)
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS) as relay:
        with pytest.raises(LabError):
            lab.relay.run(["nft", "flush", "table", "inet", "tproxy_relay"])
        rules = look(lab)
        lab.relay.run(["nft", "flush", "ruleset"])
        lab.relay.run(["nft", "-f", "-"], input="add table inet noise\ndelete table inet noise\n")
        assert "tproxy_relay" in look(lab) and look(lab) != rules, "the others' are gone, ours is not"
        check_intercepted(lab, relay, 6)
        assert restored(relay) == 0
        relay.stop()


@pytest.mark.slow
def test_a_second_relay_is_refused_and_disturbs_nothing(furnished: Lab, rules: Callable[..., str]) -> None:
    lab = furnished
    with echo_servers(lab), lab.relay_process(*BOTH_WAYS) as relay:
        installed = look(lab)
        ports = ("--ports", "16002,16006", "--inbound-port", "16006", "--outbound-port", "16002")
        for attempt_to in (
            lambda: lab.relay_process(*BOTH_WAYS, *ports).__enter__(),
            lambda: rules(lab, "apply"),
            lambda: rules(lab, "remove"),
        ):
            with pytest.raises(LabError, match=f"exited with 71.*process {relay.pid} holds the ruleset"):
                attempt_to()
        assert look(lab) == installed
        check_intercepted(lab, relay, 6)
        relay.stop()
