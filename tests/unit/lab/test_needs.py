"""What the lab needs of this machine, and what is missing is named, with the remedy."""

import os
import subprocess
import sys
from pathlib import Path

import children
import pytest

from tproxy_relay.intercept import programs
from tproxy_relay.lab import LabError, needs


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give rights up")
def test_without_its_rights_root_is_not_privileged() -> None:
    question = "from tproxy_relay.lab import needs; print(needs.privileged())"
    for lead, expected in (([], needs.privileged()), (["setpriv", "--bounding-set=-all", "--inh-caps=-all"], False)):
        done = subprocess.run(
            [*lead, sys.executable, "-c", question],
            env=children.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(expected)


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "search_path", lambda: "/nonexistent")
    with pytest.raises(LabError, match="apt-get install iproute2 nftables util-linux"):
        needs.require_tools()


def test_tools_are_found_without_the_administrators_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert programs.search_path().split(":") == ["/usr/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"]


def test_forbidden_user_namespaces_are_named_with_the_sysctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forbidden = tmp_path / "kernel" / "unprivileged_userns_clone"
    forbidden.parent.mkdir()
    forbidden.write_text("0\n")
    monkeypatch.setattr(needs, "SYSCTLS", tmp_path)
    said = str(needs.no_namespace("unshare: Operation not permitted"))
    assert "sysctl -w kernel.unprivileged_userns_clone=1" in said and "Operation not permitted" in said
    forbidden.write_text("1\n")
    assert "run it as root" in str(needs.no_namespace("unshare: Operation not permitted"))
