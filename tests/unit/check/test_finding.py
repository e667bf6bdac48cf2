"""How a finding reads, and whether the commands in it are what a shell and our own parser take."""

import shlex
from dataclasses import replace

import pytest

from tproxy_relay.check import finding
from tproxy_relay.config import loader
from tproxy_relay.settings import HostPort, PortRange, Settings


def test_a_line_says_what_why_and_how() -> None:
    line = str(finding.problem("x", "ip_forward is 0", "nothing passes", "sysctl -w net.ipv4.ip_forward=1"))
    assert line == "problem: ip_forward is 0: nothing passes. Mend: sysctl -w net.ipv4.ip_forward=1"
    assert str(finding.ok("nft", "nftables v1.0.6")) == "ok: nftables v1.0.6"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"route_table": 7007},
        {"intercept_inbound": (PortRange(8000, 8000), PortRange(9000, 9100)), "ports": (1, 2)},
        {"mark_mask": 0x700, "max_connections": 12, "connect_timeout": 2.5},
        {"bind": ("127.0.0.1", "::1"), "target": HostPort("::1", 80), "log_file": "/tmp/a b.log"},
    ],
    ids=str,
)
def test_a_command_means_the_settings_that_it_was_made_from(changes: dict[str, object]) -> None:
    wanted = replace(Settings(), **changes)  # type: ignore[arg-type]
    words = shlex.split(finding.command(wanted))
    assert words[:2] == ["tproxy-relay", "check"]
    ports = ["--inbound-port", "1", "--outbound-port", "2"] if "ports" in changes else []
    loaded = loader.load([*words[1:], *ports, "--config", "/dev/null"], {}).settings
    assert replace(loaded, inbound_port=wanted.inbound_port, outbound_port=wanted.outbound_port) == wanted


def test_a_change_is_written_even_if_it_is_the_default() -> None:
    settings = Settings(preserve_source="address", interface="eth0")
    assert "--preserve-source no" in finding.command(settings, preserve_source="no")
    assert "--interface" not in finding.command(settings, interface=None)


def test_a_value_with_blanks_is_quoted() -> None:
    assert finding.set_sysctl("net.ipv4.ip_local_port_range", "1 2") == "sysctl -w 'net.ipv4.ip_local_port_range=1 2'"
