"""etc/sysctl.d: the kernel knows every name, nothing is made less than the kernel gives by itself, and `check` says the
same."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tproxy_relay.check import limits
from tproxy_relay.lab import Lab
from tproxy_relay.net import listeners
from tproxy_relay.system.limits import DESCRIPTORS_EACH

ETC = Path(__file__).parents[2] / "etc"
FILE = ETC / "sysctl.d/10-tproxy-relay.conf"
TEXT = FILE.read_text()
OF_MODULES = ("net.netfilter.", "net.bridge.")
"""Of nf_conntrack and br_netfilter, which need not be loaded."""


def values(pattern: str) -> dict[str, str]:
    return {name: value.strip() for name, value in re.findall(rf"^{pattern}([a-z].*?) = (.*)$", TEXT, re.MULTILINE)}


ACTIVE, OFFERED = values("-?"), values("#")
UNIT = (ETC / "systemd/tproxy-relay.service").read_text()


def of_unit(key: str) -> int:
    found = re.search(rf"^{key}=(\d+)$", UNIT, re.MULTILINE)
    assert found
    return int(found[1])


def of_namespace(settings: dict[str, str]) -> dict[str, str]:
    """Those that each network namespace has for itself, so that a test may set them."""
    return {
        name: value for name, value in settings.items() if name.startswith("net.") and not name.startswith(OF_MODULES)
    }


@pytest.fixture
def all_there(lab: Lab, require_or_skip: Callable[[str], NoReturn]) -> None:
    if lab.user_namespace:
        require_or_skip("the network of an ordinary user has not all of these settings")


def test_every_line_is_a_setting_a_comment_or_empty() -> None:
    lines = [line for line in TEXT.splitlines() if line and not line.startswith("# ")]
    assert len(lines) == len(ACTIVE) + len(OFFERED) and ACTIVE and OFFERED
    assert not set(ACTIVE) & set(OFFERED)


@pytest.mark.usefixtures("all_there")
def test_the_kernel_knows_every_name(lab: Lab) -> None:
    for name in {**ACTIVE, **OFFERED}:
        if not name.startswith(OF_MODULES):
            lab.relay.sysctl(name)  # OSError if it does not


@pytest.mark.usefixtures("all_there")
def test_only_limits_are_raised_and_none_is_lowered(lab: Lab) -> None:
    for name, value in of_namespace(ACTIVE).items():
        assert int(lab.relay.sysctl(name)) <= int(value), name  # a new namespace has the kernel's own
    assert ACTIVE["net.core.somaxconn"] == str(listeners.BACKLOG)
    # For as many connections as the unit has descriptors and threads for.
    assert int(ACTIVE["vm.max_map_count"]) >= limits.maps_for(of_unit("LimitNOFILE") // DESCRIPTORS_EACH)
    assert int(ACTIVE["kernel.pid_max"]) >= of_unit("TasksMax")


def test_the_numbers_in_the_comments() -> None:
    maps = re.search(r"kernel's\n# (\d+) are enough for ([\d,]+) connections of a worker", TEXT)
    threads = re.search(r"kernel's (\d+) are enough for ([\d,]+)\n# connections", TEXT)
    assert maps and threads
    each = limits.THREADS_EACH * limits.MAPS_EACH
    assert (int(maps[1]) - limits.OTHER_MAPS) // each == int(maps[2].replace(",", ""))
    assert (int(threads[1]) - limits.OTHER_THREADS) // limits.THREADS_EACH == int(threads[2].replace(",", ""))


# --- what check says


def remedies(lab: Lab) -> dict[str, str]:
    """The settings that `check` asks for."""
    command = [sys.executable, "-m", "tproxy_relay", "check", "--json", "--config", os.devnull]
    told = json.loads(lab.relay.run([*command, "--intercept-inbound", "8080"], check=False).stdout)
    found = [re.fullmatch(r"sysctl -w '?(\S+?)=(.*?)'?", finding["remedy"]) for finding in told["findings"]]
    return {one[1]: one[2] for one in found if one}


SPOILT = {
    "net.ipv4.tcp_mtu_probing": 0,
    "net.core.somaxconn": 128,
    "net.ipv4.ip_forward": 0,
    "net.ipv6.conf.all.forwarding": 0,
    "net.ipv4.ip_local_port_range": "15000 15500",
    "net.ipv4.tcp_abort_on_overflow": 1,
    "net.ipv4.ip_nonlocal_bind": 1,
    "net.ipv6.ip_nonlocal_bind": 1,
}


@pytest.mark.usefixtures("all_there")
def test_check_recommends_what_the_file_has(fresh_lab: Lab) -> None:
    lab, wanted = fresh_lab, {**ACTIVE, **OFFERED}
    for name, value in SPOILT.items():
        lab.relay.set_sysctl(name, value)
    told = remedies(lab)
    assert set(told) == {*SPOILT, "net.ipv4.ip_local_reserved_ports"}
    assert told == {name: wanted[name] for name in told}


@pytest.mark.usefixtures("all_there")
def test_check_is_content_with_the_file(fresh_lab: Lab, tmp_path: Path) -> None:
    """With all of it, as sysctl(8) reads it."""
    lab = fresh_lab
    for name, value in SPOILT.items():
        lab.relay.set_sysctl(name, value)
    ours = of_namespace({**ACTIVE, **OFFERED})
    assert set(SPOILT) < set(ours)
    lines = [line for line in TEXT.splitlines() if line.lstrip("#").partition(" = ")[0] in ours]
    (tmp_path / "all.conf").write_text("".join(f"{line.lstrip('#')}\n" for line in lines))
    lab.relay.run(["sysctl", "-p", str(tmp_path / "all.conf")])
    assert {name: " ".join(lab.relay.sysctl(name).split()) for name in ours} == ours
    assert remedies(lab) == {}


def test_the_file_has_every_name_that_check_may_recommend() -> None:
    """All that its sources name, but for those here."""
    source = "".join(file.read_text() for file in Path(limits.__file__).parent.glob("*.py"))
    named = set()
    for name in re.findall(r"""["']((?:net|fs|vm|kernel)\.[\w.{}-]+)["']""", source):
        for family, word in (("4", "iptables"), ("6", "ip6tables")):
            named.add(name.replace("{family}", family).replace("{word}", word))
    left_out = {
        "fs.nr_open",  # it goes by max-connections
        "kernel.threads-max",  # the kernel's own grows with memory
        "net.ipv4.{name}",  # strict ones, which may stay as they are
        "net.ipv6.conf.lo.disable_ipv6",  # no limit
        "net.ipv4.ip_unprivileged_port_start",
        "net.netfilter.nf_conntrack_count",  # only read
        "net.netfilter.nf_conntrack_tcp_timeout_established",  # the kernel's own is five days
    }
    assert left_out <= named <= {*ACTIVE, *OFFERED, *left_out}
