"""A case: who is a relay, what is listened on, who holds the ruleset."""

import socket

import pytest
from doctor import case

from tproxy_relay.check.context import is_relay
from tproxy_relay.intercept import programs
from tproxy_relay.intercept.lock import Lock
from tproxy_relay.settings import PortRange


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/opt/x/bin/python /usr/local/sbin/tproxy-relay run --ports 1", True),
        ("python3 -m tproxy_relay run", True),
        ("/root/tproxy-relay/.venv/bin/python -m pytest", False),
        ("nginx: master", False),
    ],
)
def test_a_relay_is_known_by_its_program(command: str, expected: bool) -> None:
    assert is_relay((1, command)) is expected


def test_who_may_not_be_looked_at_may_be_a_relay() -> None:
    assert is_relay(None)


def test_listeners_of_both_directions() -> None:
    assert case(intercept_inbound=()).listener_ports == [] and not case(intercept_inbound=()).intercepts
    assert case().listener_ports == [15006] and case().intercepts
    assert case(intercept_outbound=(PortRange(80, 80),)).listener_ports == [15002, 15006]


def test_workers_are_those_of_the_settings_or_as_many_as_are_worth_it() -> None:
    assert case(workers=7).workers == 7 and case().workers >= 1


def test_a_command_has_the_settings_of_the_case_and_its_changes() -> None:
    assert case().command(route_table=7) == "tproxy-relay check --intercept-inbound 8000 --route-table 7"
    assert case().command("rules apply") == "tproxy-relay rules apply --intercept-inbound 8000"


@pytest.mark.usefixtures("network")
def test_a_listener_of_another_program_is_no_relay() -> None:
    assert not case().relay_listens
    with socket.create_server(("127.0.0.1", 15006)):
        assert not case().relay_listens


@pytest.mark.usefixtures("network")
def test_who_holds_the_ruleset() -> None:
    assert case().holder is None
    with Lock():
        assert case().holder is not None


@pytest.mark.usefixtures("network")
def test_the_firewall_is_everybody_elses_rules() -> None:
    programs.run(["nft", "-f", "-"], "table inet tproxy_relay { chain a { }; }; table inet somebodys { chain b { }; }")
    programs.run(["iptables-nft", "-A", "INPUT", "-j", "ACCEPT"])
    names = set(case().firewall)
    assert "nft inet somebodys" in names and "nft inet tproxy_relay" not in names
    assert any("iptables-nft" in name for name in names) and "nft ip filter" not in names
