"""What children are started with: our own program from wherever it is, and programs of others in a language we know."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tproxy_relay
from tproxy_relay.system import children

PACKAGE = str(Path(tproxy_relay.__file__).parents[1])


def test_a_module_of_ours_runs_from_any_folder(tmp_path: Path) -> None:
    command = children.module_command("tproxy_relay")
    done = subprocess.run(
        [*command, "--version"],
        cwd=tmp_path,
        env=children.own_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert tproxy_relay.__version__ in done.stdout


def test_the_package_comes_first_and_what_was_in_the_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/a:/b")
    assert children.own_environment()["PYTHONPATH"] == f"{PACKAGE}:/a:/b"
    for absent in ("", None):
        monkeypatch.delenv("PYTHONPATH", raising=False)
        if absent is not None:
            monkeypatch.setenv("PYTHONPATH", absent)
        assert children.own_environment()["PYTHONPATH"] == PACKAGE


def test_only_what_is_named_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*children.OF_THE_MANAGER, "KEPT"):
        monkeypatch.setenv(name, "x")
    everything = children.own_environment()
    assert everything == {**os.environ, "PYTHONPATH": everything["PYTHONPATH"]}
    less = children.own_environment(without=children.OF_THE_MANAGER)
    assert everything.keys() - less.keys() == children.OF_THE_MANAGER


def test_a_script_heeds_nothing_of_the_environment(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.flags.isolated, sys.flags.no_site, *sys.argv[1:])")
    command = children.script_command(str(script), "3,4", "more")
    done = subprocess.run(command, env={"PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=True)
    assert (command[0], done.stdout) == (sys.executable, "1 1 3,4 more\n")


def test_a_program_of_others_speaks_untranslated() -> None:
    given = {"LC_ALL": "de_DE.UTF-8", "PATH": "/nowhere", "HOME": "/dev/null"}
    made = children.program_environment(given, "/usr/bin:/bin")
    assert made == {"LC_ALL": "C", "PATH": "/usr/bin:/bin", "HOME": "/dev/null"}
    done = subprocess.run(["sh", "-c", "cat /no/such"], env=made, capture_output=True, text=True, check=False)
    assert "No such file" in done.stderr
