"""Settings are one value that nothing changes."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.settings import HostPort, Network, PortRange, Settings

NOT_DEFAULT = Settings(
    ports=(1, 2),
    bind=("127.0.0.1", "::1"),
    interface="eth0",
    mode="redirect",
    intercept_inbound=(PortRange(80, 80), PortRange(8000, 8100)),
    intercept_outbound=(PortRange(443, 443),),
    inbound_port=2,
    outbound_port=1,
    backend="nft",
    on_failure="closed",
    user="nobody",
    workers=3,
    cpu_affinity="on",
    stall_timeout=1.5,
    preserve_source="full",
    target=HostPort("server.example", 80),
    allow=(Network("192.0.2.0/24"), Network("2001:db8::/32", PortRange(80, 81))),
    deny=(Network("0.0.0.0/0"),),
    max_connections=100,
    max_per_source=10,
    max_rate_per_source=20,
    when_full="evict",
    connect_timeout=3.0,
    idle_timeout=60.0,
    half_close_timeout=30.0,
    drain_timeout=0.0,
    keepalive=0,
    user_timeout=20.0,
    client_congestion="bbr",
    upstream_congestion="cubic",
    client_pacing=1000,
    upstream_pacing=2000,
    socket_buffer=4096,
    mark_mask=7,
    route_table=100,
    route_priority=200,
    log_level="warning",
    log_format="json",
    log_file="/var/log/relay.log",
    admin=HostPort("127.0.0.1", 9106),
    self_probe=0.0,
)
"""No field has its default."""


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


def types(value: object) -> object:
    """The types all the way down: a tuple is equal to a named one, and True to 1."""
    if isinstance(value, (tuple, list)):
        return type(value), [types(item) for item in value]
    return type(value)


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_each_field_travels_as_json(field: "dataclasses.Field[object]") -> None:
    value = getattr(NOT_DEFAULT, field.name)
    assert value != field.default, "give it another value in NOT_DEFAULT"
    only_this = dataclasses.replace(Settings(), **{field.name: value})  # type: ignore[arg-type]
    there = Settings.from_json(json.loads(json.dumps(only_this.to_json())))
    assert there == only_this
    assert types(getattr(there, field.name)) == types(value)


@given(st.from_type(Settings))  # every field by its type
@hypothesis_settings(max_examples=100, deadline=None)
def test_whatever_they_are_they_travel_as_json(settings: Settings) -> None:
    there = Settings.from_json(json.loads(json.dumps(settings.to_json(), allow_nan=True)))
    for field in dataclasses.fields(Settings):
        before, after = getattr(settings, field.name), getattr(there, field.name)
        assert types(before) == types(after)
        assert before == after or before != before  # a float that is no number is not equal to itself


def test_an_admin_socket_travels_as_its_path() -> None:
    settings = Settings(admin="/run/relay.sock")
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_a_field_that_nobody_knows_is_not_passed_over() -> None:
    with pytest.raises(TypeError, match="no_such_setting"):
        Settings.from_json({**json.loads(json.dumps(Settings().to_json())), "no_such_setting": 1})
