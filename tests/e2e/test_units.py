"""The files for systemd: that it takes them, how exposed the service is, and that the relay works with what they leave
it. No systemd runs here, so setpriv(1) does what the unit says of capabilities."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from accounts import ACCOUNT, HAVE_ACCOUNTS, becoming, for_all_accounts
from interception import BOTH_WAYS, FAMILIES, PORT, EchoServer, opened, ping, wait_until, ways

from tproxy_relay.lab import Lab
from tproxy_relay.settings import Settings

ETC = Path(__file__).parents[2] / "etc"
UNITS = ETC / "systemd"
MOST_EXPOSED = "20"
"""Tenths of the 10 that `systemd-analyze security` gives a service without any restriction."""

Need = Callable[[str], NoReturn]


def settings(name: str) -> dict[str, list[str]]:
    """Of a unit: the values of each key."""
    found: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def installed(tmp_path: Path, require_or_skip: Need) -> Path:
    """The units, with a program that is there."""
    if shutil.which("systemd-analyze") is None:
        require_or_skip("systemd-analyze is not installed")
    for unit in UNITS.glob("*.*"):
        if unit.is_file():
            text = unit.read_text().replace("/usr/sbin/tproxy-relay", "/bin/true")
            (tmp_path / unit.name).write_text(text)
    return tmp_path


def analyze(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """systemd-analyze(1)."""
    return subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, check=False)


def test_systemd_understands_every_line(installed: Path) -> None:
    told = analyze("verify", "--recursive-errors=no", "--man=no", *installed.iterdir())
    assert (told.returncode, told.stderr) == (0, "")


def test_the_service_can_do_little_else(installed: Path) -> None:
    told = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", installed / "tproxy-relay.service")
    assert told.returncode == 0, told.stdout[-200:]


def test_there_is_time_to_drain_and_room_for_threads() -> None:
    service = settings("tproxy-relay.service")
    assert float(service["TimeoutStopSec"][0].removesuffix("s")) > Settings().drain_timeout + 5
    assert service["ExecStart"] == ["/usr/sbin/tproxy-relay run"]
    assert service["ExecReload"] == ["/usr/sbin/tproxy-relay run --print-config", "/bin/kill -HUP $MAINPID"]
    # Two descriptors and two threads for each connection.
    assert int(service["TasksMax"][0]) >= int(service["LimitNOFILE"][0]) <= int(service["LimitNPROC"][0])


def test_the_relay_works_with_the_capabilities_of_the_unit(lab: Lab, require_or_skip: Need) -> None:
    if not HAVE_ACCOUNTS or lab.user_namespace:
        require_or_skip("it takes root to become another account")
    service = settings("tproxy-relay.service")
    (given,), (bound,) = service["AmbientCapabilities"], service["CapabilityBoundingSet"]
    assert given == bound and service["NoNewPrivileges"] == ["yes"]
    names = [name.removeprefix("CAP_").lower() for name in given.split()]
    *command, end = becoming(ACCOUNT, *names)
    bounding = f"--bounding-set=-all,{','.join('+' + name for name in names)}"
    wrapper = (*for_all_accounts(), *command, bounding, "--no-new-privs", end)
    with lab.relay_process(*BOTH_WAYS, "--user", ACCOUNT, wrapper=wrapper) as relay:
        servers = [EchoServer(host) for host in (lab.server, lab.relay)]
        try:
            for source, destination in ways(lab).values():
                for family in FAMILIES.values():
                    with source.connect(destination.address(family), PORT) as sock:
                        assert ping(sock) == ""
            wait_until(lambda: opened(relay) == 2 * len(ways(lab)), "all were intercepted")
        finally:
            for server in servers:
                server.close()
        (worker,) = relay.workers
        held = Path(f"/proc/{worker}/status").read_text()
        assert "CapEff:\t0000000000000000" in held and "CapPrm:\t0000000000000000" in held
        relay.stop()
