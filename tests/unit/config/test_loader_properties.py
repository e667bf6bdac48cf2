"""Whatever is configured, `--print-config` writes it down as a file that says the same.

The row wants it with the oldest and the newest ConfigArgParse; the matrix of setup.cfg brings those.
"""

from pathlib import Path

import pytest
import rows
import written
from hypothesis import event, given, reject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tproxy_relay.config import loader
from tproxy_relay.config.options import OPTIONS
from tproxy_relay.errors import ConfigError, UsageError

NOWHERE = "/nonexistent/tproxy-relay.conf"

ANY_FILE = st.fixed_dictionaries({}, optional=written.ANY)


def is_possible(texts: dict[str, str]) -> bool:
    """Leaves most of what contradicts itself out: of those pairs this is not the test."""
    intercepts = any(name.startswith("intercept-") for name in texts)
    return not (intercepts and {"ports", "bind", "interface"} & set(texts))


@pytest.mark.row(
    "B10",
    "any configuration is written by `--print-config` and read again",
    "the same settings in 1,000 cases of 1,000",
)
@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_what_print_config_prints_is_a_file_that_says_the_same(tmp_path: Path, seen: rows.Seen, cases: int) -> None:
    path = tmp_path / "round-trip.conf"
    same = 0

    @hypothesis_settings(max_examples=cases)
    @given(ANY_FILE.filter(is_possible))
    def check(texts: dict[str, str]) -> None:
        nonlocal same
        try:
            first = loader.load([f"--{name}={text}" for name, text in texts.items()], {}, default_file=NOWHERE)
        except (UsageError, ConfigError) as refused:
            event(f"refused: {refused}"[:40])
            reject()
        path.write_text(loader.print_config(first), encoding="utf-8")
        assert loader.load(["--config", str(path)], {}).settings == first.settings
        same += 1

    check()
    assert same >= cases
    if cases == 1000:
        seen("the same settings in 1,000 cases of 1,000")


@hypothesis_settings(max_examples=100)
@given(ANY_FILE.filter(is_possible))
def test_the_environment_says_the_same_as_the_command_line(texts: dict[str, str]) -> None:
    try:
        first = loader.load([f"--{name}={text}" for name, text in texts.items()], {}, default_file=NOWHERE)
    except (UsageError, ConfigError):
        reject()
    variables = {OPTIONS[name].variable: text for name, text in texts.items()}
    assert loader.load([], variables, default_file=NOWHERE).settings == first.settings


def test_every_option_that_a_file_can_set_is_tried() -> None:
    assert set(written.ANY) == {name for name, option in OPTIONS.items() if option.in_file}
