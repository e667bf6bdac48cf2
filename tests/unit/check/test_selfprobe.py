"""One connection, and what becomes of it; a relay that takes it is in tests/e2e/test_check.py."""

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
