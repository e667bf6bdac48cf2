"""Settings are one value that nothing changes."""

import dataclasses

import pytest

from tproxy_relay.settings import HostPort, Settings


@pytest.mark.parametrize(
    ("host", "text"), [("192.0.2.1", "192.0.2.1:80"), ("2001:db8::1", "[2001:db8::1]:80"), ("a.test", "a.test:80")]
)
def test_a_host_and_port_print_as_they_are_written(host: str, text: str) -> None:
    assert str(HostPort(host, 80)) == text


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.mode = "redirect"  # type: ignore[misc]
    assert hash(settings) == hash(Settings()), "nothing in them can be changed in place"


def test_the_defaults_of_the_design() -> None:
    settings = Settings()
    assert (settings.ports, settings.bind, settings.mode) == ((15002, 15006), ("0.0.0.0", "::"), "tproxy")
    assert (settings.preserve_source, settings.target, settings.max_connections) == ("no", None, None)
    assert (settings.connect_timeout, settings.idle_timeout, settings.half_close_timeout) == (10, 0, 0)
    assert (settings.drain_timeout, settings.keepalive, settings.user_timeout) == (30, 60, 0)
    assert (settings.mark_mask, settings.log_level, settings.log_format) == (0x07000000, "debug", "console")
