"""What the environment can set, and what is only worth a warning."""

import pytest
from rows import Seen

from tproxy_relay.config import environment
from tproxy_relay.errors import ConfigError


def test_a_variable_sets_its_option() -> None:
    found = environment.gather({"TPROXY_RELAY_CONNECT_TIMEOUT": "3", "HOME": "/"})
    assert found == {"connect-timeout": ("3", "environment variable TPROXY_RELAY_CONNECT_TIMEOUT")}


def test_the_file_can_be_named() -> None:
    assert environment.gather({"TPROXY_RELAY_CONFIG": "/a"})["config"].text == "/a"


def test_the_usual_names_of_log_settings_work_and_the_prefixed_ones_win() -> None:
    assert environment.gather({"LOG_LEVEL": "info"})["log-level"] == (
        "info",
        "environment variable LOG_LEVEL",
    )
    both = {"LOG_LEVEL": "not ours", "TPROXY_RELAY_LOG_LEVEL": "error"}
    assert environment.gather(both)["log-level"].text == "error"
    assert environment.gather({"LOG_FORMAT": "json"})["log-format"].text == "json"


@pytest.mark.row("B5", "an empty variable", "as if it were not there")
def test_an_empty_variable_is_not_set(seen: Seen) -> None:
    environ = {
        "TPROXY_RELAY_PORTS": "",
        "TPROXY_RELAY_LOG_LEVEL": "",
        "LOG_LEVEL": "info",
        "TPROXY_RELAY_PROTS": "",
    }
    assert list(environment.gather(environ)) == ["log-level"]
    assert not list(environment.warnings(environ))
    seen("not set")


@pytest.mark.parametrize(
    "variable, message",
    [
        (
            "TPROXY_RELAY_CONNECT_TIMEOUT",
            "environment variable TPROXY_RELAY_CONNECT_TIMEOUT: 'x' is not a number of seconds",
        ),
        ("LOG_LEVEL", "environment variable LOG_LEVEL: 'x' is not one of debug, info, warning, error"),
    ],
)
def test_a_bad_value_names_its_variable(variable: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        environment.gather({variable: "x"})
    assert str(refused.value) == message


def test_brackets_are_for_the_file_only() -> None:
    with pytest.raises(ConfigError):
        environment.gather({"TPROXY_RELAY_PORTS": "[1,2]"})


@pytest.mark.parametrize(
    "variable, warning",
    [
        ("TPROXY_RELAY_PROTS", "no such setting (did you mean 'TPROXY_RELAY_PORTS'?)"),
        ("TPROXY_RELAY_XYZZY", "no such setting"),
        ("TPROXY_RELAY_", "no such setting"),
        ("TPROXY_RELAY_KEEP", "'keep' is for the command line"),
        ("TPROXY_RELAY_PRINT_CONFIG", "'print-config' is for the command line"),
        ("TPROXY_RELAY_COMMAND", "'command' is for the command line"),
    ],
)
@pytest.mark.row("B6", "an unknown variable with our prefix", "a warning")
def test_a_variable_that_looks_like_ours_and_is_not(variable: str, warning: str, seen: Seen) -> None:
    assert environment.gather({variable: "1"}) == {}
    assert list(environment.warnings({variable: "1"})) == [f"{variable} in the environment is ignored: {warning}"]
    seen("warned")


def test_other_programs_variables_are_theirs() -> None:
    assert not list(environment.warnings({"TPROXY_RELA": "1", "LOG_LEVELS": "1", "tproxy_relay_ports": "1"}))


def test_a_warning_is_one_line_whatever_the_variable_is_called() -> None:
    (warning,) = environment.warnings({"TPROXY_RELAY_A\nB\udcff": "1"})
    assert warning.isprintable()
