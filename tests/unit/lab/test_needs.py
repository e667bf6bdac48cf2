"""What a lab needs of this machine: what is missing is named, with the remedy."""

from pathlib import Path

import pytest

from tproxy_relay.intercept import programs
from tproxy_relay.lab import Lab, LabError, needs


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "search_path", lambda: "/nonexistent")
    with pytest.raises(LabError, match="apt-get install iproute2 nftables util-linux"):
        needs.require_tools()


def test_tools_are_found_without_the_administrators_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    assert programs.search_path().split(":") == ["/usr/bin", "/usr/local/sbin", "/usr/sbin", "/sbin"]


def test_forbidden_user_namespaces_are_named_with_the_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    forbidden = {"kernel/unprivileged_userns_clone": "0"}
    monkeypatch.setattr(needs, "_read", lambda name: forbidden.get(name, ""))
    said = str(needs.no_namespace("unshare: Operation not permitted"))
    assert "sysctl -w kernel.unprivileged_userns_clone=1" in said and "Operation not permitted" in said
    forbidden.clear()
    assert "run it as root" in str(needs.no_namespace("unshare: Operation not permitted"))


def test_a_namespace_that_cannot_be_made_is_one_line_with_the_kernels_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: unshare failed: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(programs, "search_path", lambda: str(tmp_path))
    monkeypatch.setattr(needs, "require_tools", lambda: None)
    with pytest.raises(LabError) as caught:
        Lab().__enter__()
    assert "unshare failed: Operation not permitted" in str(caught.value)
    assert "\n" not in str(caught.value)
