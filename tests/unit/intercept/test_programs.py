"""Running other programs: what is said when one is missing, refuses, hangs, or may not."""

from pathlib import Path

import pytest

from tproxy_relay.errors import CapabilityMissingError, SystemRefusedError
from tproxy_relay.intercept import programs
from tproxy_relay.intercept.programs import ProgramError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where programs are looked for, beside the system's own."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_it_gets_its_input_and_its_words_come_back(folder: Path) -> None:
    program(folder, "nft", '#!/bin/sh\nread line; echo "$1 $line $LC_ALL"\n')
    assert programs.run(["nft", "; rm -rf /"], "hello\n").stdout == "; rm -rf / hello C\n"


@pytest.mark.parametrize(
    "name, package",
    [("nft", "nftables"), ("ip", "iproute2"), ("ip6tables-restore", "iptables"), ("iptables-save", "iptables")],
)
def test_a_missing_program_is_named_with_its_package(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "search_path", lambda: str(tmp_path))
    with pytest.raises(ProgramError, match=f"^{name} not found: install the package {package}$"):
        programs.run([name])


@pytest.mark.parametrize(
    "said",
    [
        "Error: Could not process rule: Operation not permitted",
        "RTNETLINK answers: Operation not permitted",
        "iptables v1.8.9 (nf_tables): Could not fetch rule set generation id: Permission denied (you must be root)",
        "netlink: Error: cache initialization failed: Operation not permitted",
        "Fatal: can't open lock file /run/xtables.lock: Permission denied",
    ],
)
def test_a_missing_right_is_told_from_other_refusals(said: str, folder: Path) -> None:
    program(folder, "nft", f'#!/bin/sh\necho "{said}" >&2; exit 1\n')
    with pytest.raises(CapabilityMissingError, match="CAP_NET_ADMIN: run this as root") as caught:
        programs.run(["nft", "-f", "-"])
    assert caught.value.exit_code == 77 and "nft -f -" in str(caught.value)


def test_a_refusal_is_one_line_with_the_programs_own_words(folder: Path) -> None:
    program(folder, "nft", "#!/bin/sh\necho '/dev/stdin:1:2: Error: syntax\n  ^^^'; exit 3\n")
    with pytest.raises(SystemRefusedError, match="^`nft x` failed: /dev/stdin:1:2: Error: syntax \\^\\^\\^$") as caught:
        programs.run(["nft", "x"])
    assert caught.value.exit_code == 71
    assert programs.run(["nft", "x"], check=False).returncode == 3


def test_one_that_says_nothing_or_far_too_much(folder: Path) -> None:
    program(folder, "ip", "#!/bin/sh\nexit 1\n")
    with pytest.raises(ProgramError, match="it said nothing"):
        programs.run(["ip"])
    program(folder, "ip", "#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\0' x; printf '\\377'; exit 1\n")
    with pytest.raises(ProgramError) as caught:
        programs.run(["ip"])
    assert len(str(caught.value)) < 500


def test_one_that_hangs_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(folder, "ip", "#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setattr(programs, "TIMEOUT", 0.1)
    with pytest.raises(ProgramError, match=r"`ip route` did not end within 0.1 s"):
        programs.run(["ip", "route"], check=False)


def test_one_that_cannot_be_run(folder: Path) -> None:
    program(folder, "ip", "no program\n\0")
    with pytest.raises(ProgramError, match=f"cannot run {folder}/ip: Exec format error"):
        programs.run(["ip"], check=False)
