"""The files of the service below a folder: all of them, right for where the program is, and gone again."""

import configparser
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tproxy_relay.cli import install

ROOT = Path(__file__).parents[3]
FOR_MACHINES = {
    str(path.relative_to(ROOT / "etc"))
    for path in (ROOT / "etc").rglob("*")
    if path.is_file() and path.relative_to(ROOT / "etc").parts[0] not in ("package", "container")
}
CONF = "/etc/tproxy-relay.conf"
UNIT = "usr/local/lib/systemd/system/tproxy-relay.service"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """What pip makes, but for this checkout."""
    path = tmp_path / "venv/bin/tproxy-relay"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tproxy_relay.cli.main import main\nsys.exit(main())\n"
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


def say(program: Path, command: str, root: Path, code: int = 0) -> list[str]:
    """The lines that it says."""
    # The mask of the caller makes no difference.
    mine = ["sh", "-c", 'umask 077; exec "$@"', "sh"]
    argv = [*mine, str(program), command, "--root", str(root), "--config", os.devnull]
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == code, done.stdout
    return done.stdout.splitlines()


def files(root: Path) -> set[str]:
    return {f"/{path.relative_to(root)}" for path in root.rglob("*") if not path.is_dir()}


def test_every_file_of_etc_is_installed_and_in_the_wheel() -> None:
    assert {target.name for target in install.TARGETS} == FOR_MACHINES
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = {
        f"{place.removeprefix('share/tproxy-relay/')}/{Path(name).name}": name
        for place, names in setup["options.data_files"].items()
        for name in names.split()
    }
    assert listed == {f"etc/{name}": f"etc/{name}" for name in FOR_MACHINES}


def test_installed_and_taken_away(program: Path, root: Path) -> None:
    said = say(program, "install", root)
    assert files(root) == {target.path for target in install.TARGETS}
    assert [line.split() for line in said if line.startswith("installed")] == [
        ["installed", f"{root}{target.path}"] for target in install.TARGETS
    ]
    for target in install.TARGETS:
        path = root / target.path[1:]
        assert stat.S_IMODE(path.stat().st_mode) == target.mode
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert "systemctl enable --now tproxy-relay" in "\n".join(said)
    said = say(program, "install", root)
    assert sum(line.startswith("unchanged") for line in said) == len(install.TARGETS)
    said = say(program, "uninstall", root)
    assert files(root) == set() and len(said) == len(install.TARGETS)
    assert not (root / "usr/local/share/doc/tproxy-relay").exists()
    assert say(program, "uninstall", root) == []


def test_they_start_the_program_where_it_is(program: Path, root: Path) -> None:
    say(program, "install", root)
    for path in files(root) - {CONF}:
        text = (root / path[1:]).read_text()
        assert text.count(f"{install.PACKAGED} ") == 0, path
    assert f"\nExecStart={program} run\n" in (root / UNIT).read_text()
    assert f"\nDAEMON={program}\n" in (root / "etc/default/tproxy-relay").read_text()


def test_what_the_administrator_has_written_stays(program: Path, root: Path) -> None:
    say(program, "install", root)
    for path in ("etc/tproxy-relay.conf", UNIT):
        with (root / path).open("a") as file:
            file.write("# changed\n")
    said = say(program, "install", root)
    assert f"kept       {root}{CONF}: it is not as we would make it, see {root}{CONF}.dpkg-dist" in said
    assert f"updated    {root}/{UNIT}" in said
    assert (root / f"{CONF[1:]}.dpkg-dist").read_bytes() == (ROOT / "etc/tproxy-relay.conf").read_bytes()
    assert (root / CONF[1:]).read_text().endswith("# changed\n")
    said = say(program, "uninstall", root)
    assert f"kept       {root}{CONF}: it has been changed" in said
    assert files(root) == {CONF}


def test_a_folder_that_nobody_may_write(program: Path, root: Path) -> None:
    root.write_text("no folder")
    (said,) = say(program, "install", root, code=71)
    assert said.startswith(f"tproxy-relay: cannot write {root}/etc") and said.endswith(": Not a directory")


def test_a_program_whose_name_needs_quotes(program: Path, root: Path) -> None:
    moved = program.parent.rename(program.parent.with_name("bin $(reboot)")) / program.name
    (said,) = say(moved, "install", root, code=1)
    assert "a service cannot start" in said and not root.exists()
