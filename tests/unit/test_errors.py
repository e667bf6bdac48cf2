"""The exit codes are a promise to scripts and units."""

import pytest

from tproxy_relay import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.RelayError, 1),
        (errors.UsageError, 2),
        (errors.KernelUnsupportedError, 69),
        (errors.SystemRefusedError, 71),
        (errors.CapabilityMissingError, 77),
        (errors.ConfigError, 78),
    ],
)
def test_each_kind_has_its_code_and_its_line(kind: type[errors.RelayError], code: int) -> None:
    error = kind("what is wrong")
    assert error.exit_code == code
    assert str(error) == "what is wrong"
    assert isinstance(error, errors.RelayError)
