"""The texts made from the table: the checked-in files are up to date, and say what is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tproxy_relay.config import conf_file, loader, reference
from tproxy_relay.config.options import OPTIONS, POSITIONAL, Option
from tproxy_relay.settings import Settings

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name, path", reference.FILES.items())
def test_the_file_in_the_tree_is_what_the_command_prints(name: str, path: str) -> None:
    command = [sys.executable, "-m", "tproxy_relay.config.reference", name]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / path).read_text(encoding="utf-8") == printed, "run: python -m tproxy_relay.config.reference all"


def test_what_the_shipped_file_sets() -> None:
    shipped = conf_file.parse(reference.conf(), "")
    assert {name: given.text for name, given in shipped.items()} == {
        "bind": "127.0.0.1,::1",
        "user": "tproxy-relay",
        "log-level": "info",
        "log-format": "json",
    }


def test_the_shipped_file_lists_every_setting_with_its_default(tmp_path: Path) -> None:
    listed = re.findall(r"^#?([a-z-]+) =", reference.conf(), re.MULTILINE)
    assert listed == [name for name, option in OPTIONS.items() if option.in_file]
    uncommented = re.sub(r"^#([a-z-]+ = )", r"\1", reference.conf(), flags=re.MULTILINE)
    (tmp_path / "conf").write_text(uncommented)
    loaded = loader.load(["--config", str(tmp_path / "conf")], {})
    shipped = Settings(bind=("127.0.0.1", "::1"), user="tproxy-relay", log_level="info", log_format="json")
    assert loaded.settings == shipped


def test_all_writes_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in reference.FILES.values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert reference.main(["all"]) == 0
    for name, path in reference.FILES.items():
        assert (tmp_path / path).read_text(encoding="utf-8") == reference.text(name)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option not in POSITIONAL])
def test_help_describes_every_option(name: str) -> None:
    assert re.search(rf"^  --{name}\b", reference.help_text(), re.MULTILINE)


@pytest.mark.parametrize("word", POSITIONAL, ids=lambda option: option.name)
def test_help_describes_the_words(word: Option) -> None:
    assert word.kind and re.search(rf"^  {word.name}\b", reference.help_text(), re.MULTILINE)
    assert re.sub(r"\s+", "", word.kind.allowed) in re.sub(r"\s+", "", reference.help_text())


def test_help_fits_a_terminal() -> None:
    assert max(map(len, reference.help_text().splitlines())) <= 100


def test_a_wrong_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main(["html"]) == 2
    assert reference.main([]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
