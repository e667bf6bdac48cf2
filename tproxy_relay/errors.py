"""What stops the program, each kind with its exit code.

The codes come from sysexits.h where it has one for the case. The message of each of these errors is
one line, in the user's words: what is wrong, where, and what mends it. Ordinary ends of a connection
(a reset, a refusal) are not errors here: they are outcomes (see outcome.py).
"""


class RelayError(Exception):
    """The program cannot run. ``str()`` of it is the line that the user reads."""

    exit_code = 1


class UsageError(RelayError):
    """The command line is wrong."""

    exit_code = 2


class KernelUnsupportedError(RelayError):
    """The kernel lacks something that the configuration needs (EX_UNAVAILABLE)."""

    exit_code = 69


class SystemRefusedError(RelayError):
    """The operating system said no: a port is taken, an address is not ours (EX_OSERR)."""

    exit_code = 71


class CapabilityMissingError(RelayError):
    """The process lacks a Linux capability (EX_NOPERM)."""

    exit_code = 77


class ConfigError(RelayError):
    """The configuration file or the environment is wrong (EX_CONFIG)."""

    exit_code = 78


def of_exit_code(code: int, message: str) -> RelayError:
    """The error that another process of the relay has met, from its exit code and its line. A code that no kind has
    gives a plain RelayError."""
    for kind in (UsageError, KernelUnsupportedError, SystemRefusedError, CapabilityMissingError, ConfigError):
        if kind.exit_code == code:
            return kind(message)
    return RelayError(message)
