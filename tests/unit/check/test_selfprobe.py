"""One connection, and what becomes of it; a relay that takes it is in tests/e2e/test_check.py."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import pytest
from doctor import case

from tproxy_relay.check import selfprobe
from tproxy_relay.check.finding import Finding, ok, problem, warning
from tproxy_relay.check.namespace import Namespace
from tproxy_relay.intercept import programs
from tproxy_relay.lab import LabError, needs


@pytest.fixture
def possible(require_or_skip: Callable[[str], NoReturn]) -> None:
    try:
        needs.require_tools()
    except LabError as error:
        require_or_skip(str(error))


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("accept", selfprobe.DIRECT),
        ("tcp dport 8000 reject with tcp reset", selfprobe.REFUSED),
        ("tcp dport 8000 drop", selfprobe.LOST),
    ],
)
def test_what_becomes_of_a_connection(
    possible: None, monkeypatch: pytest.MonkeyPatch, rule: str, expected: str
) -> None:
    monkeypatch.setattr(selfprobe, "CONNECT_TIMEOUT", 0.3 if expected == selfprobe.LOST else 20)
    with Namespace(user=not needs.privileged()) as one:
        one.ip("link set lo up")
        chain = f"chain c {{ type filter hook input priority 0; {rule}; }}"
        one.run(["nft", "-f", "-"], f"table inet t {{ {chain}; }}")
        assert selfprobe.attempt(one, one, 4, "127.0.0.1", 8000, 15006) == expected


@pytest.mark.usefixtures("network")
def test_addresses_are_of_a_network_that_nobody_uses_here() -> None:
    assert selfprobe.address(case(), 4, 0) == ("192.0.2.2", "192.0.2.1", 30)
    assert selfprobe.address(case(), 4, 1) == ("192.0.2.6", "192.0.2.5", 30)
    assert selfprobe.address(case(), 6, 1) == ("2001:db8:7006:1::2", "2001:db8:7006:1::1", 64)
    programs.run("ip addr add 192.0.2.9/24 dev lo".split())
    programs.run("ip route add 198.51.100.0/24 dev lo".split())
    assert selfprobe.address(case(), 4, 0).far == "203.0.113.2"


@pytest.mark.usefixtures("network")
def test_without_a_relay_or_its_rules_nothing_is_tried() -> None:
    assert not [*selfprobe.probe_connections(case())]
    one = case()
    one.relay_listens = True
    assert not [*selfprobe.probe_connections(one)], "there are no rules"


@pytest.mark.usefixtures("network")
def test_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfprobe, "TURN_TIMEOUT", 0.0)
    with selfprobe._alone():
        (found,) = selfprobe.try_connections(case())
    assert found.level == "warning" and "somebody else" in found.what
    with selfprobe._alone():
        assert True, "its turn is over"


def test_what_may_be_the_cause() -> None:
    """The first problem, or else a warning of what takes or drops some packets."""
    lost = problem(selfprobe.NAME, "it is lost", "no answer", "again")
    other, marks = warning("path-mtu", "m", "", "r"), warning("lost-marks", "marks", "", "spare it")
    bad, worse = problem("lo", "down", "", "up"), problem("nat", "n", "", "x")
    proxy = warning("other-proxy", "proxy", "")

    def blamed(*found: Finding) -> tuple[str, str]:
        cause: Finding | None = None
        for one in found:
            cause = selfprobe.likelier(cause, one)
        told = selfprobe.explained(lost, cause)
        return told.why, told.remedy

    assert blamed(ok("filter", "fine"), other) == ("no answer", "again")
    assert blamed(other, marks, proxy) == ("marks", "spare it")
    assert blamed(proxy) == ("proxy", "again"), "nothing is known that would mend it"
    assert blamed(marks, bad, worse) == ("down", "up")
    assert selfprobe.explained(bad, worse) is bad


ETH0 = 'policy drop; iifname "eth0" accept'


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    "chain, mode, sure",
    [
        (f"input priority 0; {ETH0}", "tproxy", False),
        (f"input priority 0; {ETH0}", "redirect", False),
        (f"prerouting priority -300; {ETH0}", "tproxy", False),
        ('input priority 0; policy drop; iifname "eth*" accept; ip saddr 10.0.0.0/8 accept', "tproxy", False),
        ('input priority 0; iifname != "eth0" drop', "tproxy", False),
        ('output priority 0; policy drop; oifname "eth0" accept', "tproxy", False),
        ("input priority 0; policy drop", "tproxy", True),
        ('input priority 0; policy drop; iifname "lo" accept', "tproxy", True),
        (f"input priority 0; tcp dport 8000 drop; {ETH0}", "tproxy", True),
        (f"input priority 0; {ETH0}; tcp dport 8000 accept", "tproxy", True),
        (f"input priority 0; {ETH0}; meta mark & 0x07000000 == 0x01000000 accept", "tproxy", True),
        (f"forward priority 0; {ETH0}", "tproxy", True),
        ("input priority 0; policy drop; ip saddr 10.0.0.0/8 accept", "tproxy", True),
    ],
)
def test_filters_that_let_in_by_interface_say_nothing_of_others(chain: str, mode: str, sure: bool) -> None:
    text = f"table inet somebodys {{ chain c {{ type filter hook {chain}; }}; }}"
    programs.run(["nft", "-f", "-"], text)
    found = [*selfprobe._by_interface(case(mode=mode), 4, "inbound")]
    assert found == ([] if sure else ["nft chain inet somebodys c"])


SQUAT = """
import os, socket, sys
os.setgid(65534), os.setuid(65534)
with socket.socket(socket.AF_UNIX) as taken:
    taken.bind("\\0tproxy_relay/self-probe")
    if sys.argv[1] == "listens":
        taken.listen()
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not needs.privileged(), reason="takes another account")
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("how", ["listens", "silent"])
def test_another_account_does_not_keep_anybody_from_trying(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(selfprobe, "TURN_TIMEOUT", 20 * selfprobe.ANSWER_TIMEOUT)
    argv = [sys.executable, "-c", SQUAT, how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as squatter:
        assert squatter.stdout and squatter.stdout.readline() == b"taken\n"
        began = time.monotonic()
        with selfprobe._alone():
            assert time.monotonic() - began < 10 * selfprobe.ANSWER_TIMEOUT
        assert squatter.stdin
        squatter.stdin.close()


@pytest.mark.usefixtures("network")
def test_who_waits_for_his_turn_gets_it() -> None:
    with contextlib.ExitStack() as first:
        first.enter_context(selfprobe._alone())
        waiting = threading.Thread(target=lambda: contextlib.ExitStack().enter_context(selfprobe._alone()))
        waiting.start()
        waiting.join(0.1)
        assert waiting.is_alive()
        first.close()
        waiting.join(selfprobe.TURN_TIMEOUT)
        assert not waiting.is_alive()
