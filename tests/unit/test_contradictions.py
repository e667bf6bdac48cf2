"""Pairs of settings that cannot be meant together, and pairs that look so and can."""

import pytest

from tproxy_relay import contradictions
from tproxy_relay.errors import ConfigError, RelayError, UsageError
from tproxy_relay.options import OPTIONS
from tproxy_relay.settings import HostPort, Settings


def refusal(settings: Settings, on_command_line: str = "") -> RelayError:
    origins = {name: "command line" if name == on_command_line else "default" for name in OPTIONS}
    with pytest.raises(RelayError) as refused:
        contradictions.refuse(settings, origins)
    return refused.value


def is_accepted(settings: Settings) -> bool:
    contradictions.refuse(settings, {name: "default" for name in OPTIONS})
    return True


def test_keep_is_for_demo() -> None:
    error = refusal(Settings(keep=True), on_command_line="keep")
    assert isinstance(error, UsageError)
    assert str(error) == (
        "--keep is for 'demo', and the command is 'run': drop --keep or say demo "
        "(keep: command line, command: default)"
    )
    assert is_accepted(Settings(keep=True, command="demo"))


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


def test_a_cap_that_another_cap_makes_idle_is_worth_a_warning() -> None:
    assert list(contradictions.warnings(Settings(max_connections=10, max_per_source=11))) == [
        "max-per-source 11 has no effect: max-connections 10 is reached first"
    ]
    assert not list(contradictions.warnings(Settings(max_connections=10, max_per_source=10)))
    assert not list(contradictions.warnings(Settings(max_per_source=10)))
