"""Pairs of settings or arguments that cannot be meant together, and pairs that look so and can."""

from typing import Any

import pytest

from tproxy_relay.config import conflicts
from tproxy_relay.config.options import ARGUMENTS, OPTIONS
from tproxy_relay.errors import ConfigError, RelayError, UsageError
from tproxy_relay.settings import HostPort, Network, PortRange, Settings

HTTP = (PortRange(80, 80),)
EVERYTHING = (PortRange(1, 65535),)


def refusal(settings: Settings = Settings(), on_command_line: str = "", **arguments: object) -> RelayError:
    origins = {name: "command line" if name == on_command_line else "default" for name in OPTIONS}
    with pytest.raises(RelayError) as refused:
        conflicts.refuse(settings, {**ARGUMENTS, **arguments}, origins)
    return refused.value


def is_accepted(settings: Settings = Settings(), **arguments: object) -> bool:
    conflicts.refuse(settings, {**ARGUMENTS, **arguments}, {name: "default" for name in OPTIONS})
    return True


def test_keep_is_for_demo() -> None:
    error = refusal(keep=True, on_command_line="keep")
    assert isinstance(error, UsageError)
    assert str(error) == (
        "--keep is for 'demo', and the command is 'run': drop --keep or say demo "
        "(keep: command line, command: default)"
    )
    assert is_accepted(keep=True, command="demo")


def test_take_over_is_for_run() -> None:
    error = refusal(take_over=True, command="demo", on_command_line="take-over")
    assert isinstance(error, UsageError)
    assert str(error).startswith("--take-over is for 'run', and the command is 'demo': drop --take-over or say run")
    assert is_accepted(take_over=True)


def test_a_network_that_is_allowed_and_denied() -> None:
    web, everything = Network("10.0.0.0/8", PortRange(80, 80)), Network("10.0.0.0/8")
    error = refusal(Settings(allow=(everything, web), deny=(web,)))
    assert isinstance(error, ConfigError)
    assert str(error).startswith("10.0.0.0/8:80 is allowed and denied: drop one of them")
    assert is_accepted(Settings(allow=(web,), deny=(everything,)))


@pytest.mark.parametrize(
    "host, bind",
    [
        ("127.0.0.1", ("0.0.0.0",)),
        ("127.8.8.8", ("0.0.0.0", "::")),
        ("::1", ("::",)),
        ("10.0.0.1", ("10.0.0.1",)),
        ("localhost", ("0.0.0.0", "::")),
        ("LOCALHOST", ("127.0.0.1", "::1")),
    ],
)
def test_a_target_that_is_the_relay_itself(host: str, bind: tuple[str, ...]) -> None:
    error = refusal(Settings(target=HostPort(host, 15002), bind=bind))
    assert isinstance(error, ConfigError)
    assert "this relay's own listener" in str(error)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(target=HostPort("127.0.0.1", 80)),
        Settings(target=HostPort("192.0.2.1", 15002)),
        Settings(target=HostPort("relay.example", 15002)),
        Settings(target=HostPort("127.0.0.1", 15002), bind=("10.0.0.1", "::")),
        Settings(target=HostPort("::1", 15002), bind=("0.0.0.0",)),
        Settings(target=HostPort("localhost", 15002), bind=("::1",)),
        Settings(target=HostPort("127.0.0.1", 15002), interface="eth0"),
    ],
)
def test_a_target_that_is_somebody_else(settings: Settings) -> None:
    assert is_accepted(settings)


def test_a_link_local_address_needs_an_interface() -> None:
    assert "set interface too" in str(refusal(Settings(bind=("fe80::1",))))
    assert is_accepted(Settings(bind=("fe80::1",), interface="eth0"))
    assert is_accepted(Settings(bind=("169.254.1.1",)))


def test_settings_that_go_well_together() -> None:
    assert is_accepted(Settings(mode="redirect", preserve_source="full"))
    assert is_accepted(Settings(user_timeout=1, keepalive=60, connect_timeout=10))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(command="rules"), "'rules' needs one more word: show, apply, remove or status"),
        (dict(action="show"), "'show' goes with 'rules', and the command is 'run'"),
        (dict(command="check", action="status"), "'status' goes with 'rules', and the command is 'check'"),
        (dict(root="/mnt"), "--root is for 'install' and 'uninstall', and the command is 'run'"),
        *(
            (
                dict(command=command, json=True),
                f"--json is for 'status', 'sessions', 'rules' and 'check', and the command is '{command}'",
            )
            for command in ("run", "demo", "top")
        ),
        (dict(show=(("port", "1"),)), "--show is for 'sessions' and 'top', and the command is 'run'"),
        (dict(command="status", abort="1-1-1"), "--abort is for 'sessions', and the command is 'status'"),
        (dict(command="sessions", abort="1-1-1", show=(("port", "1"),)), "--abort ends one connection"),
        *(
            (dict(command="rules", action=action), f"'rules {action}' needs something to intercept")
            for action in ("show", "apply", "status")
        ),
    ],
)
def test_words_in_the_wrong_place(arguments: dict[str, Any], sentence: str) -> None:
    assert str(refusal(**arguments)).startswith(sentence)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(command="check"),
        dict(command="check", json=True),
        dict(command="install", root="/mnt"),
        dict(command="uninstall", root="/mnt"),
        dict(command="rules", action="remove", json=True),
        dict(command="rules", action="status", json=True, settings=Settings(intercept_inbound=HTTP)),
        dict(command="rules", action="apply", settings=Settings(intercept_outbound=HTTP)),
    ],
)
def test_words_in_the_right_place(arguments: dict[str, Any]) -> None:
    assert is_accepted(**arguments)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            Settings(intercept_inbound=HTTP, inbound_port=9),
            "the listener inbound-port 9, which is not in ports 15002,15006",
        ),
        (Settings(intercept_outbound=HTTP, outbound_port=9), "the listener outbound-port 9, which is not in ports"),
        (
            Settings(intercept_inbound=HTTP, ports=(15002,)),
            "the listener inbound-port 15006, which is not in ports 15002",
        ),
        (Settings(intercept_inbound=EVERYTHING), "1-65535 has the relay's own port 15002 in it"),
        (Settings(intercept_outbound=(PortRange(15000, 15004),)), "15000-15004 has the relay's own port 15002 in it"),
        (Settings(intercept_outbound=HTTP, interface="eth0"), "a listener on eth0 does not hear them"),
        (Settings(intercept_inbound=HTTP, interface="lo"), "nothing arrives from outside on lo"),
        (
            Settings(intercept_inbound=HTTP, mode="redirect", bind=("127.0.0.1",)),
            "a listener on 127.0.0.1 does not hear",
        ),
        (Settings(intercept_inbound=HTTP, mode="redirect", bind=("0.0.0.0", "::1")), "a listener on ::1 does not hear"),
    ],
)
def test_interception_that_would_lead_nowhere(settings: Settings, sentence: str) -> None:
    error = refusal(settings, on_command_line="intercept-outbound")
    assert sentence in str(error)
    assert isinstance(error, UsageError if settings.intercept_outbound else ConfigError)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(inbound_port=9, outbound_port=9),
        Settings(intercept_inbound=HTTP, outbound_port=9),
        Settings(intercept_inbound=HTTP, intercept_outbound=HTTP, ports=(9,), inbound_port=9, outbound_port=9),
        Settings(intercept_inbound=HTTP, interface="eth0"),
        Settings(intercept_outbound=HTTP, interface="lo"),
        Settings(intercept_inbound=HTTP, bind=("127.0.0.1", "::1")),
        Settings(intercept_inbound=HTTP, mode="redirect"),
        Settings(intercept_inbound=HTTP, mode="redirect", bind=("127.0.0.1", "10.0.0.1")),
        Settings(intercept_outbound=HTTP, mode="redirect", bind=("127.0.0.1",)),
    ],
)
def test_interception_that_leads_to_a_listener(settings: Settings) -> None:
    assert is_accepted(settings)


def test_a_cap_that_another_cap_makes_idle_is_worth_a_warning() -> None:
    assert list(conflicts.warnings(Settings(max_connections=10, max_per_source=11))) == [
        "max-per-source 11 has no effect: max-connections 10 is reached first"
    ]
    assert not list(conflicts.warnings(Settings(max_connections=10, max_per_source=10)))
    assert not list(conflicts.warnings(Settings(max_per_source=10)))


@pytest.mark.parametrize("user", ["root", "0"])
def test_workers_of_root_exempt_every_program_of_root_which_is_worth_a_warning(user: str) -> None:
    (warning,) = conflicts.warnings(Settings(user=user, intercept_outbound=HTTP))
    assert "no connection of any program of root is intercepted" in warning
    assert not list(conflicts.warnings(Settings(user=user, intercept_inbound=HTTP)))
    assert not list(conflicts.warnings(Settings(user="relay", intercept_outbound=HTTP)))
