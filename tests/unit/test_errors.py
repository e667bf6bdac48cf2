"""The exit codes are a promise to scripts and units."""

import pytest

from tproxy_relay import errors

KINDS = [
    (errors.RelayError, 1),
    (errors.UsageError, 2),
    (errors.KernelUnsupportedError, 69),
    (errors.SystemRefusedError, 71),
    (errors.CapabilityMissingError, 77),
    (errors.ConfigError, 78),
]


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_each_kind_has_its_code_and_its_line(kind: type[errors.RelayError], code: int) -> None:
    error = kind("what is wrong")
    assert error.exit_code == code
    assert str(error) == "what is wrong"
    assert isinstance(error, errors.RelayError)


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_an_error_of_another_process_keeps_its_kind(kind: type[errors.RelayError], code: int) -> None:
    error = errors.of_exit_code(code, "what is wrong")
    assert type(error) is kind
    assert str(error) == "what is wrong"


@pytest.mark.parametrize("code", [0, 3, -9, 255])
def test_any_other_exit_code_is_some_error(code: int) -> None:
    assert type(errors.of_exit_code(code, "what is wrong")) is errors.RelayError
